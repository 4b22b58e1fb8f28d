"""The tests of a problem, as they stand in a data set's ``ground_truth``.

Three forms, each a JSON object; the first two are those of Eurus-2-RL-Data:

* ``{"inputs": [..], "outputs": [..]}``: standard input and output, one text per test. ``"checker"`` may name another
  comparison (`compare.CHECKERS`) or hold code: ``{"code": "def check(input, output, expected): ..."}``.
* ``{"fn_name": "f", "inputs": [[..], ..], "outputs": [..]}``: calls of a function (or of a method of ``Solution``)
  with lists of arguments.
* ``{"assert_code": "assert f(1) == 2"}``: assertions; a list makes several tests. ``"entry_point"`` goes to a function
  ``check`` that the assertions define (HumanEval), ``"setup_code"`` runs before them and ``"prefix_code"`` before the
  program's own code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_prime.verify.code.compare import CHECKERS


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
    results: Sequence[Any]

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
    if not isinstance(content, Mapping):
        raise ProblemError("the tests are no JSON object")
    if "assert_code" in content:
        problem = _read_assertions(content)
    elif "inputs" in content and "outputs" in content:
        problem = _read_pairs(content)
    else:
        raise ProblemError("the tests have neither inputs and outputs nor assert_code")
    if len(problem) == 0:
        raise ProblemError("there are no tests")
    return problem


def _read_assertions(content: Mapping[str, Any]) -> AssertTests:
    code = content["assert_code"]
    pieces = [code] if isinstance(code, str) else code
    texts = [content.get("setup_code") or "", content.get("prefix_code") or "", content.get("entry_point") or ""]
    if not isinstance(pieces, list) or not all(isinstance(text, str) for text in (*pieces, *texts)):
        raise ProblemError("assert_code must be text or a list of texts, setup_code, prefix_code and entry_point text")
    return AssertTests(pieces, setup=texts[0], prefix=texts[1], entry_point=texts[2] or None)


def _read_pairs(content: Mapping[str, Any]) -> OutputTests | CallTests:
    inputs, outputs, name = content["inputs"], content["outputs"], content.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ProblemError("inputs and outputs must be lists of the same length")
    if name:
        if not isinstance(name, str):
            raise ProblemError("fn_name must be text")
        return CallTests(name, [_arguments(value) for value in inputs], [_from_text(value) for value in outputs])
    checker, code = content.get("checker"), ""
    if checker is None:
        checker = "tokens"
    if isinstance(checker, Mapping) and isinstance(checker.get("code"), str):
        checker, code = "", checker["code"]
    elif not isinstance(checker, str) or checker not in CHECKERS:
        raise ProblemError(f'checker must be one of {", ".join(CHECKERS)}, or {{"code": ...}}')
    return OutputTests([_text(v) for v in inputs], [_text(v) for v in outputs], checker, code)


def _text(value: Any) -> str:
    """Some data sets give standard input as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    """A list of arguments, or text with one JSON value per line."""
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [_from_text(line) for line in value.splitlines()]
    return [value]


def _from_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
