"""The inside of the sandbox: runs the program's text, in one of three roles.

* ``script``: as ``__main__``, on standard input and output;
* ``serve``: as a module whose functions are called from outside, one message per call;
* ``test``: trusted test code (assertions, or a checker), which reaches the program only by such calls.

Everything here shares its process with text that may be hostile, so nothing here is believed: the outside judges
standard output, the values of calls, and what the separate test process says.
"""

from __future__ import annotations

import atexit
import io
import os
import site
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_prime.verify.code.sandbox import wire

CONTROL, CALLS = 3, 4
"""Descriptors: to the worker; to whoever calls the program's functions."""
_MAX_HANDLES = 100_000
THREAD_STACK_BYTES = 8 * 2**20
_FILE = "program.py"


def take_descriptors(descriptors: Sequence[int]) -> None:
    """Puts standard input, standard output, control and calls where `run` expects them, and closes all others."""
    copies = [os.dup(number) for number in descriptors]
    for target, source in zip((0, 1, CONTROL, CALLS), copies, strict=True):
        os.dup2(source, target, inheritable=False)
    os.closerange(CALLS + 1, 256)


def run(role: str) -> NoReturn:
    """Says that this process is locked in, takes one request from `CONTROL`, runs it and ends the process."""
    atexit._clear()
    sys.stdin = _stream(0, "stdin", "r", "surrogateescape")
    sys.stdout = _stream(1, "stdout", "w", "surrogateescape")
    sys.stderr = _stream(2, "stderr", "w", "backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = [_FILE]
    # Not there where the interpreter was started without `site`.
    site.setquit()
    # The main stack is made for deep recursion; so much for every thread would leave no room for a second one.
    threading.stack_size(THREAD_STACK_BYTES)
    # No text of the program has been read: it can neither send this in another's place nor take it back.
    os.write(CONTROL, wire.LOCKED_IN)
    request = wire.receive(CONTROL)
    roles: dict[str, Callable[[dict[str, Any]], int]] = {"script": _script, "serve": _serve, "test": _test}
    os._exit(roles[role](request))


def _stream(descriptor: int, name: str, mode: str, errors: str) -> io.TextIOWrapper:
    """A standard stream with the attributes that CPython gives it."""
    raw = io.FileIO(descriptor, mode, closefd=False)
    raw.name = f"<{name}>"  # pyright: ignore[reportAttributeAccessIssue]
    buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    stream = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=name == "stderr")
    stream.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def _report(event: str, **details: Any) -> None:
    try:
        wire.send(CONTROL, {"event": event, **details})
    except wire.WireError:
        os._exit(1)


def _compile(code: str, filename: str) -> types.CodeType | None:
    try:
        return compile(code, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        _report("compile_error", error=type(error).__name__)
        return None


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules[name] = module
    return module


def _script(request: dict[str, Any]) -> int:
    code = _compile(request["code"], "program.py")
    if code is None:
        return 1
    namespace = _module("__main__").__dict__
    namespace["__file__"] = f"/tmp/{_FILE}"
    status = 0
    try:
        exec(code, namespace)
    except SystemExit as error:
        status = _exit_status(error)
    except BaseException as error:
        _report("exception", error=type(error).__name__)
        status = 1
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        _report("exception", error=type(error).__name__)
        return 1
    return status


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


class _Handles:
    """Objects that cannot travel, by number."""

    def __init__(self) -> None:
        self._objects: list[Any] = []

    def keep(self, value: Any) -> int:
        if len(self._objects) >= _MAX_HANDLES:
            raise MemoryError("too many objects")
        self._objects.append(value)
        return len(self._objects) - 1

    def find(self, number: int) -> Any:
        return self._objects[number]


def _serve(request: dict[str, Any]) -> int:
    """Defines the program's functions, says so, and answers calls until the other side closes."""
    helpers = _module("prefix").__dict__
    namespace = _module("program").__dict__
    try:
        for text, filename, target in ((request["prefix"], "prefix.py", helpers), (request["code"], _FILE, namespace)):
            code = _compile(text, filename)
            if code is None:
                return 1
            if target is namespace:
                # The program sees what stands before it; what it defines itself does not change that.
                target.update({name: value for name, value in helpers.items() if not name.startswith("__")})
            exec(code, target)
    except BaseException as error:
        _report("exception", error=type(error).__name__)
        return 1
    _report("ready")
    handles = _Handles()
    while True:
        try:
            message = wire.receive(CALLS)
        except wire.WireError:
            return 0
        reply = _answer(message, helpers if message.get("helper") else namespace, handles)
        try:
            wire.send(CALLS, {"nonce": message["nonce"], **reply})
        except (wire.WireError, ValueError, RecursionError, MemoryError):
            _report("exception", error="OutputLimit")
            return 1


def _answer(message: dict[str, Any], namespace: dict[str, Any], handles: _Handles) -> dict[str, Any]:
    try:
        arguments = [wire.decode(value, handles.find) for value in message["args"]]
        keywords = {name: wire.decode(value, handles.find) for name, value in message["kwargs"].items()}
        target = _target(message, namespace, handles)
        value = _OPERATIONS[message["op"]](target, arguments, keywords)
        changed = [wire.encode(a, handles.keep) if isinstance(a, _MUTABLE) else None for a in arguments]
        return {"value": wire.encode(value, handles.keep), "args": changed}
    except BaseException as error:
        return {"error": type(error).__name__, "builtin": _builtin_base(error), "text": _text(error)}


def _target(message: dict[str, Any], namespace: dict[str, Any], handles: _Handles) -> Any:
    if "handle" in message:
        return handles.find(message["handle"])
    name = message["name"]
    if name not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), name)
    if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
    return namespace[name]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return ""


def _builtin_base(error: BaseException) -> str:
    """The nearest built-in ancestor, which the caller's side raises in its place."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


_MUTABLE = (list, dict, set, bytearray)
_OPERATIONS: dict[str, Callable[[Any, list[Any], dict[str, Any]], Any]] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": lambda target, args, kwargs: getattr(target, *args),
    "set": lambda target, args, kwargs: setattr(target, *args),
    "iterate": lambda target, args, kwargs: list(target),
    "length": lambda target, args, kwargs: len(target),
    "item": lambda target, args, kwargs: target[args[0]],
    "text": lambda target, args, kwargs: str(target),
    "truth": lambda target, args, kwargs: bool(target),
    "self": lambda target, args, kwargs: target,
}


def _test(request: dict[str, Any]) -> int:
    from megatron_prime.verify.code.sandbox.assertions import run_tests

    run_tests(request, CALLS, _report)
    return 0
