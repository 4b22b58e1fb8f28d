"""The test process: assertions about a program that lives in another process.

To the test code, the program's names look as if they were defined beside it. Calls go over a pipe and return plain
data; in-place changes of lists, dictionaries and sets come back with the result. What is no plain data stays with the
program behind a `Remote`, which equals only itself: the program's own ``__eq__`` has no say in a comparison.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import secrets
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from megatron_prime.verify.code.sandbox import wire

_ALIASES = {"np": "numpy", "pd": "pandas"}
_ENDS_OF_ITERATION = (StopIteration, StopAsyncIteration)


class ProgramGone(Exception):
    """The program's process has ended or speaks another language."""


class Program:
    """The caller's end of the pipe to a ``serve`` process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def ask(self, operation: str, target: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """One request and its answer.

        Raises:
            ProgramGone: there is no well-formed answer to exactly this request.
            Exception: the built-in exception nearest to what the program raised.
        """
        nonce = secrets.token_hex(8)
        message = {
            "nonce": nonce,
            "op": operation,
            "args": [wire.encode(value, _known) for value in arguments],
            "kwargs": {name: wire.encode(value, _known) for name, value in keywords.items()},
            **target,
        }
        try:
            wire.send(self._descriptor, message)
            reply = wire.receive(self._descriptor)
            return self._take(reply, nonce, arguments)
        except wire.WireError as error:
            raise ProgramGone(str(error)) from error

    def _take(self, reply: Any, nonce: str, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(reply, dict) or reply.get("nonce") != nonce:
            raise ProgramGone("an answer to something else")
        if "error" in reply:
            raise _RaisedByProgram(str(reply["error"])) from _exception(
                str(reply.get("builtin")), str(reply.get("text"))
            )
        changed = reply.get("args")
        if not isinstance(changed, list) or len(changed) != len(arguments):
            raise ProgramGone("an answer without its arguments")
        for argument, value in zip(arguments, changed, strict=True):
            if value is not None:
                _restore(argument, wire.decode(value, self.remote))
        return wire.decode(reply.get("value"), self.remote)

    def remote(self, number: Any) -> Remote:
        """What stands for an object of the program."""
        return Remote(self, int(number))


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    # The end of an iteration would end one of the tests' own.
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, _ENDS_OF_ITERATION):
        return RuntimeError(f"{name}: {text}")
    try:
        return kind(text)
    except TypeError:
        return RuntimeError(f"{name}: {text}")


class _RaisedByProgram(Exception):
    """Carries an exception of the program to where it is raised again, as its cause."""


def _restore(argument: Any, value: Any) -> None:
    """Makes a caller's argument what the program has turned its copy into."""
    if isinstance(argument, (list, bytearray)):
        argument[:] = value
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(value)


def _known(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test passes a {type(value).__name__} to the program, which cannot travel")


class Remote:
    """An object that stays with the program. Equality and hash are the identity of this stand-in."""

    def __init__(self, program: Program, number: int) -> None:
        self._program = program
        self._number = number

    def _ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        return _unwrapped(self._program.ask, operation, {"handle": self._number}, arguments, keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("iterate"))

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __bool__(self) -> bool:
        return self._ask("truth") is True


class Name:
    """A top-level name of the program, looked up at each use."""

    def __init__(self, program: Program, name: str) -> None:
        self._program = program
        self._name = name

    def _ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        return _unwrapped(self._program.ask, operation, {"name": self._name}, arguments, keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)


def _unwrapped(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except _RaisedByProgram as error:
        assert error.__cause__ is not None
        raise error.__cause__ from error


def run_tests(request: dict[str, Any], descriptor: int, report: Callable[..., None]) -> None:
    """Runs the tests of a request one after the other and reports on each.

    Args:
        request: ``setup`` (code before all tests), ``tests`` (numbered pieces of code), ``entry_point`` (or null),
            ``variables`` (plain values for a checker; there is then no program to call) and ``nonce`` (of the reports).
        descriptor: pipe to the program's process.
        report: sends an event to the worker.
    """
    nonce = request["nonce"]
    program = Program(descriptor)
    try:
        pieces = [compile(text, "test.py", "exec", dont_inherit=True) for _, text in request["tests"]]
        setup = compile(request["setup"], "setup.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        report("bad_tests", nonce=nonce, error=str(error)[:200])
        return
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins, **request["variables"]}
    entry_point = request["entry_point"]
    texts = [request["setup"], *[text for _, text in request["tests"]]]
    if not request["variables"]:
        _bind(namespace, "\n".join(texts), program, entry_point)
    candidate = None if entry_point is None else Name(program, entry_point)
    status, error = _attempt_setup(setup, namespace)
    for (number, _), piece in zip(request["tests"], pieces, strict=True):
        if status == "pass":
            report("started", nonce=nonce, number=number)
            result = _attempt(lambda piece=piece: _run_piece(piece, namespace, candidate))
        else:
            result = (status, error)
        report("result", nonce=nonce, number=number, status=result[0], error=result[1])


def _attempt_setup(setup: types.CodeType, namespace: dict[str, Any]) -> tuple[str, str]:
    try:
        exec(setup, namespace)
    except ProgramGone as error:
        return "program_gone", str(error)[:200]
    except BaseException as error:
        return ("runtime_error" if _comes_from_program(error) else "bad_tests"), type(error).__name__
    return "pass", ""


def _comes_from_program(error: BaseException) -> bool:
    """Whether an exception is one of the program's, or was raised because of one."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, (_RaisedByProgram, ProgramGone)):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def _run_piece(piece: Any, namespace: dict[str, Any], candidate: Name | None) -> None:
    if candidate is None:
        exec(piece, namespace)
        return
    namespace.pop("check", None)
    exec(piece, namespace)
    if callable(namespace.get("check")):
        namespace["check"](candidate)


def _attempt(action: Callable[[], None]) -> tuple[str, str]:
    try:
        action()
    except AssertionError as error:
        return ("runtime_error" if isinstance(error.__cause__, _RaisedByProgram) else "wrong_answer"), "AssertionError"
    except ProgramGone as error:
        return "program_gone", str(error)[:200]
    except BaseException as error:
        return "runtime_error", type(error).__name__
    return "pass", ""


def _bind(namespace: dict[str, Any], text: str, program: Program, entry_point: str | None) -> None:
    """Defines the names that the tests use and do not define: a module where one can be meant, else the program's.

    The program has no say in it: what it calls ``abs`` or ``math`` cannot take the place of the real ones, unless the
    tests use nothing but built-in names, one of which then must be the program's.
    """
    names = free_names(text)
    own = {name for name in names | {entry_point} if name is not None and not hasattr(builtins, name)}
    called = {node.func.id for node in ast.walk(ast.parse(text)) if _is_call_of_name(node)}  # type: ignore[attr-defined]
    for name in own or names:
        module = None if name in called else _importable(_ALIASES.get(name, name))
        namespace.setdefault(name, module or Name(program, name))


def _is_call_of_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _importable(name: str) -> Any:
    if name not in sys.stdlib_module_names and name not in _ALIASES.values():
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def free_names(text: str) -> set[str]:
    """Names that code reads and nowhere defines."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound
