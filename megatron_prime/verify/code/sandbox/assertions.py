"""The test process: assertions about a program that lives in another process.

To the test code, the program's names look as if they were defined beside it (`names` says which those are). Calls go
over a pipe; arguments and results are copies. In-place changes of lists, dictionaries and sets come back only from a
function that returns None, which has no other way to answer. What is no plain data stays with the program behind a
`Remote`, which equals only itself: the program's own ``__eq__`` has no say in a comparison.
"""

from __future__ import annotations

import ast
import builtins
import secrets
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from megatron_prime.verify.code.sandbox import wire
from megatron_prime.verify.code.sandbox.names import (
    BrokenTests,
    Names,
    entry_name,
    has_classes,
    sort_names,
    test_functions,
)

_ENDS_OF_ITERATION = (StopIteration, StopAsyncIteration)


class ProgramGone(Exception):
    """The program's process has ended or speaks another language."""


class Program:
    """The caller's end of the pipe to a ``serve`` process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.num_asked = 0
        self.gave_nan = False
        """Whether a result held what is no number: every comparison with it is false, and its negation true."""

    def ask(self, operation: str, target: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """One request and its answer.

        Raises:
            ProgramGone: there is no well-formed answer to exactly this request.
            Exception: the built-in exception nearest to what the program raised.
        """
        nonce = secrets.token_hex(8)
        self.num_asked += 1
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
        result = wire.decode(reply.get("value"), self.remote)
        for argument, value in zip(arguments, changed, strict=True):
            if value is not None and result is None:
                restored = wire.decode(value, self.remote)
                self.gave_nan |= _has_nan(restored)
                _restore(argument, restored)
        self.gave_nan |= _has_nan(result)
        return result

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


def _has_nan(value: Any) -> bool:
    """Whether plain data holds a float, complex or decimal that is no number."""
    if isinstance(value, (float, complex)):
        return value != value
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, dict):
        return any(map(_has_nan, value)) or any(map(_has_nan, value.values()))
    return isinstance(value, (list, tuple, set, frozenset)) and any(map(_has_nan, value))


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
    """A top-level name of the program (or of the problem's prefix in its process), looked up at each use."""

    def __init__(self, program: Program, name: str, *, is_helper: bool = False) -> None:
        self._program = program
        self._target = {"name": name, "helper": is_helper}

    def _ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        return _unwrapped(self._program.ask, operation, self._target, arguments, keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)


class Module:
    """The program as a module, for tests that import it."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __getattr__(self, name: str) -> Name:
        return Name(self._program, name)


def _unwrapped(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except _RaisedByProgram as error:
        assert error.__cause__ is not None
        raise error.__cause__ from error


class _Tests:
    """The tests of a request, compiled, with the names that they use."""

    def __init__(self, request: dict[str, Any], program: Program) -> None:
        self.numbers = [number for number, _ in request["tests"]]
        self.program = program
        self.entry = entry_name(request["entry_point"])
        texts = [request["setup"], *[text for _, text in request["tests"]]]
        try:
            trees = [ast.parse(text) for text in texts]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise BrokenTests(f"they do not compile: {error}"[:200]) from error
        self.namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins, **request["variables"]}
        self.is_checker = bool(request["variables"])
        self.names = Names({}, frozenset(), {}, frozenset(), {})
        if not self.is_checker:
            self.names = sort_names(trees, request["prefix"], self.entry)
            self._bind(request["prefix"])
        self.runners = [test_functions(tree) for tree in trees[1:]]
        try:
            self.setup, *self.pieces = [
                compile(tree, "test.py", "exec", dont_inherit=True) for tree in map(ast.fix_missing_locations, trees)
            ]
        except (SyntaxError, ValueError, RecursionError) as error:
            raise BrokenTests(f"they do not compile: {error}"[:200]) from error
        # Tests that ask about it themselves can be trusted with it.
        self.knows_nan = any("nan" in text.lower() for text in texts)

    def _bind(self, prefix: str) -> None:
        """Defines the names that the tests use and do not define."""
        for name, theirs in self.names.program.items():
            self.namespace[name] = Name(self.program, theirs)
        for name in self.names.solution:
            self.namespace[name] = Module(self.program)
        self.namespace |= self.names.objects
        if not self.names.helpers:
            return
        if has_classes(prefix):
            # Their objects cannot travel: they are made, and compared, where the program is.
            self.namespace |= {name: Name(self.program, name, is_helper=True) for name in self.names.helpers}
            return
        own: dict[str, Any] = {"__name__": "prefix", "__builtins__": builtins}
        try:
            exec(compile(prefix, "prefix.py", "exec", dont_inherit=True), own)
        except BaseException as error:
            raise BrokenTests(f"prefix_code raises {type(error).__name__}: {error}"[:200]) from error
        self.namespace |= {name: own[name] for name in self.names.helpers if name in own}

    def run_setup(self) -> tuple[str, str]:
        """Status and message of the set-up code."""
        try:
            exec(self.setup, self.namespace)
        except ProgramGone as error:
            return "program_gone", str(error)[:200]
        except BaseException as error:
            # What it does with the program's results may fail because of them.
            blamed = self.program.num_asked > 0 or _comes_from_program(error)
            return ("runtime_error", type(error).__name__) if blamed else ("bad_tests", _told("setup_code", error))
        return "pass", ""

    def run(self, number: int) -> tuple[str, str]:
        """Status and message of one test."""
        try:
            self._run_piece(number)
        except AssertionError as error:
            raised = isinstance(error.__cause__, _RaisedByProgram)
            return ("runtime_error" if raised else "wrong_answer"), "AssertionError"
        except ProgramGone as error:
            return "program_gone", str(error)[:200]
        except BaseException as error:
            if not _comes_from_program(error) and self._is_broken(error):
                return "bad_tests", _told("a test", error)
            return "runtime_error", type(error).__name__
        if self.program.gave_nan and not self.knows_nan:
            return "wrong_answer", "NaN"
        if self.program.num_asked == 0 and not self.is_checker:
            return "bad_tests", "the tests never call the program"
        return "pass", ""

    def _is_broken(self, error: BaseException) -> bool:
        """Whether a test fails by itself, whatever the program does."""
        if isinstance(error, NameError):
            return error.name in self.names.undefined
        return isinstance(error, ImportError)

    def _run_piece(self, number: int) -> None:
        namespace = self.namespace
        if self.entry is not None:
            namespace.pop("check", None)
        exec(self.pieces[number], namespace)
        if self.entry is not None and callable(namespace.get("check")):
            namespace["check"](Name(self.program, self.entry))
        functions, classes = self.runners[number]
        for name in functions:
            namespace[name]()
        for name in classes:
            _run_class(namespace[name])


def _run_class(kind: Any) -> None:
    """Calls the tests of a class as pytest and unittest do."""
    import unittest

    for name in [name for name in dir(kind) if name.startswith("test")]:
        case = kind(name) if issubclass(kind, unittest.TestCase) else kind()
        for step in ("setUp", "setup_method", name, "tearDown", "teardown_method"):
            if hasattr(case, step):
                getattr(case, step)()


def run_tests(request: dict[str, Any], descriptor: int, report: Callable[..., None]) -> None:
    """Runs the tests of a request one after the other and reports on each.

    Args:
        request: ``setup`` (code before all tests), ``tests`` (numbered pieces of code), ``prefix`` (code of the problem
            before the program's), ``entry_point`` (or null), ``variables`` (plain values for a checker; there is then
            no program to call) and ``nonce`` (of the reports).
        descriptor: pipe to the program's process.
        report: sends an event to the worker.
    """
    nonce = request["nonce"]
    try:
        tests = _Tests(request, Program(descriptor))
    except BrokenTests as error:
        report("bad_tests", nonce=nonce, error=str(error))
        return
    outcome = tests.run_setup()
    for place, number in enumerate(tests.numbers):
        result = outcome
        if outcome[0] == "pass":
            report("started", nonce=nonce, number=number)
            result = tests.run(place)
        report("result", nonce=nonce, number=number, status=result[0], error=result[1])


def _told(what: str, error: BaseException) -> str:
    return f"{what} raises {type(error).__name__}: {error}"[:200]


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
