"""The tests of a problem, as they stand in a data set's ``ground_truth``.

Four forms of JSON; the first two are those of Eurus-2-RL-Data:

* ``{"inputs": [..], "outputs": [..]}``: standard input and output, one text per test. ``"checker"`` may name another
  comparison (`compare.CHECKERS`) or hold code: ``{"code": "def check(input, output, expected): ..."}``.
* ``{"fn_name": "f", "inputs": [[..], ..], "outputs": [..]}``: calls of a function (or of a method of ``Solution``)
  with lists of arguments.
* ``[{"input": .., "output": .., "testtype": "stdin"}, ..]`` (LiveCodeBench, DeepCoder): either of them, test by test;
  also as text under ``assert_code``.
* ``{"assert_code": "assert f(1) == 2"}``: assertions; a list makes several tests. ``"entry_point"`` goes to a function
  ``check`` that the assertions define (HumanEval), ``"setup_code"`` runs before them and ``"prefix_code"`` before the
  program's own code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_prime.verify.code.compare import CHECKERS
from megatron_prime.verify.code.sandbox.names import ENTRY_POINT


class ProblemError(ValueError):
    """Tests that cannot be used."""


@dataclass(frozen=True, slots=True)
class OutputTests:
    """Standard input and output."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    checker: str = "tokens"
    """Name of a comparison, empty where there is `checker_code`."""
    checker_code: str = ""

    def __len__(self) -> int:
        return len(self.inputs)

    def first(self, count: int) -> OutputTests:
        """The first tests only."""
        return replace(self, inputs=self.inputs[:count], outputs=self.outputs[:count])


@dataclass(frozen=True, slots=True)
class CallTests:
    """Arguments and results of one function."""

    fn_name: str
    arguments: Sequence[Sequence[Any]]
    results: Sequence[tuple[Any, ...]]
    """Of each call, every reading of the expected result."""

    def __len__(self) -> int:
        return len(self.arguments)

    def first(self, count: int) -> CallTests:
        """The first tests only."""
        return replace(self, arguments=self.arguments[:count], results=self.results[:count])


@dataclass(frozen=True, slots=True)
class AssertTests:
    """Assertions about the program's functions."""

    pieces: Sequence[str]
    setup: str = ""
    prefix: str = ""
    entry_point: str | None = None

    def __len__(self) -> int:
        return len(self.pieces)

    def first(self, count: int) -> AssertTests:
        """The first tests only."""
        return replace(self, pieces=self.pieces[:count])


Problem = OutputTests | CallTests | AssertTests


def parse_problem(ground_truth: str) -> Problem:
    """Reads the tests of a problem.

    Raises:
        ProblemError: says what is wrong with them.
    """
    try:
        content = json.loads(ground_truth)
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"the tests are no JSON: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("assert_code"), str | list):
        packed = unpacked_list(content["assert_code"])
        content = packed if packed is not None else content
    if isinstance(content, list) and content:
        content = pairs_of_list(content)
    if not isinstance(content, Mapping):
        raise ProblemError("the tests are no JSON object")
    if "assert_code" in content:
        problem = _read_assertions(content)
    elif "inputs" in content and "outputs" in content:
        problem = _read_pairs(content)
    else:
        found = ", ".join(map(repr, content)) or "nothing"
        raise ProblemError(f"the tests have neither inputs and outputs nor assert_code; there is {found}")
    if len(problem) == 0:
        raise ProblemError("there are no tests")
    return problem


def unpacked_list(tests: Any) -> list[Any] | None:
    """The list of test objects that a text (or a list) holds; None where it is anything else."""
    if isinstance(tests, str):
        if not tests.lstrip().startswith("["):
            return None
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError):
            return None
    return tests if isinstance(tests, list) and tests and all(isinstance(t, Mapping) for t in tests) else None


def pairs_of_list(tests: Sequence[Any]) -> dict[str, Any]:
    """Tests in the manner of LiveCodeBench and DeepCoder, a list of objects, as `inputs` and `outputs`.

    Raises:
        ProblemError: objects of another kind, or of several kinds.
    """
    if not tests or not all(isinstance(t, Mapping) and "input" in t and "output" in t for t in tests):
        raise ProblemError("the tests are a list, but not of objects with input and output")
    kinds = {str(t.get("testtype") or t.get("type") or ("functional" if _name_of(t) else "stdin")) for t in tests}
    names = {_name_of(t) for t in tests}
    if kinds <= {"stdin", "stdin_stdout"} and names == {None}:
        return {"inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests]}
    if not kinds <= {"functional", "function_call"}:
        raise ProblemError(f"tests of type {', '.join(sorted(kinds))}; known are stdin, functional and function_call")
    if len(names) != 1 or None in names:
        raise ProblemError("tests of functions without one fn_name (or metadata.func_name)")
    calls = [_call_of(t["input"], t["output"]) for t in tests]
    return {"fn_name": names.pop(), "inputs": [c[0] for c in calls], "outputs": [c[1] for c in calls]}


def _name_of(test: Mapping[str, Any]) -> str | None:
    metadata = test.get("metadata")
    inner = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    name = test.get("fn_name") or test.get("func_name") or inner
    return str(name) if name else None


def _call_of(arguments: Any, result: Any) -> tuple[Any, Any]:
    """One call of a list; some sets put both its arguments and its result into one more list."""
    wrapped = isinstance(arguments, list) and len(arguments) == 1 and isinstance(arguments[0], list)
    if wrapped and isinstance(result, list) and len(result) == 1:
        return arguments[0], result[0]
    return arguments, result


def _read_assertions(content: Mapping[str, Any]) -> AssertTests:
    code = content["assert_code"]
    pieces = [code] if isinstance(code, str) else code
    texts = [content.get("setup_code") or "", content.get("prefix_code") or "", content.get("entry_point") or ""]
    if not isinstance(pieces, list) or not all(isinstance(text, str) for text in (*pieces, *texts)):
        raise ProblemError("assert_code must be text or a list of texts, setup_code, prefix_code and entry_point text")
    if pieces and not any(_ASSERTS.search(text) for text in (*pieces, texts[0])):
        raise ProblemError("the tests assert nothing: there is no assert in assert_code")
    if texts[2] and ENTRY_POINT.fullmatch(texts[2].strip()) is None:
        raise ProblemError(f"entry_point {texts[2]!r} is no name of a function and no Solution().method")
    return AssertTests(pieces, setup=texts[0], prefix=texts[1], entry_point=texts[2] or None)


_ASSERTS = re.compile(r"\bassert|\braise\b|\.fail\(")


def _read_pairs(content: Mapping[str, Any]) -> OutputTests | CallTests:
    inputs, outputs, name = content["inputs"], content["outputs"], content.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ProblemError("inputs and outputs must be lists of the same length")
    if name:
        if not isinstance(name, str):
            raise ProblemError("fn_name must be text")
        return CallTests(name, [_arguments(value) for value in inputs], [_readings(value) for value in outputs])
    checker, code = content.get("checker"), ""
    if checker is None:
        checker = "tokens"
    if isinstance(checker, Mapping) and isinstance(checker.get("code"), str):
        checker, code = "", checker["code"]
    elif not isinstance(checker, str) or checker not in CHECKERS:
        raise ProblemError(f'checker must be one of {", ".join(CHECKERS)}, or {{"code": ...}}')
    texts = [_text(value) for value in outputs]
    if texts and not code and not any(text.strip() for text in texts):
        raise ProblemError("every expected output is empty: a program that does nothing would pass")
    return OutputTests([_text(value) for value in inputs], texts, checker, code)


def _text(value: Any) -> str:
    """Some data sets give standard input as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    """A list of arguments, or text with one JSON value per line."""
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [_readings(line)[0] for line in value.splitlines()]
    return [value]


def _readings(value: Any) -> tuple[Any, ...]:
    """What a result may be: text that is JSON too may stand for the value or for itself."""
    if not isinstance(value, str):
        return (value,)
    try:
        return json.loads(value), value
    except (ValueError, RecursionError):
        return (value,)
