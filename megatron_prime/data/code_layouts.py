"""Layouts of problems with programs: where each data set has its question, its tests and its reference programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

CODE_LAYOUTS = (
    "APPS and TACO (question, input_output, solutions), DeepCoder and LiveCodeBench (problem, tests, solutions), "
    "KodCode (question, test, solution), LeetCodeDataset (problem_description, test, entry_point, completion), or MBPP "
    "(prompt, test_list, code)"
)
_REFERENCES = ("solutions", "solution", "code", "canonical_solution", "completion")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeProblem:
    """A question with the tests of its answer, as `verify.code.problem` reads them."""

    text: str
    tests: Any
    """None where the row has none."""
    references: tuple[str, ...] = ()

    @property
    def ground_truth(self) -> str:
        """The tests as text; empty where there are none."""
        return json.dumps(self.tests) if self.tests else ""


def read_code(row: Row) -> CodeProblem | None:
    """Reads a row of a data set of programs; None where it is of none that is known."""
    for read in (_read_apps, _read_leetcode, _read_kodcode, _read_tests, _read_mbpp):
        found = read(row)
        if found is not None:
            text, tests = found
            starter = row.get("starter_code")
            if isinstance(starter, str) and starter.strip() and starter.strip() not in text:
                text = f"{text}\n\n{starter.strip()}"
            return CodeProblem(text=text, tests=tests, references=references(row))
    return None


def _read_apps(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("question"), row.get("input_output")
    return (problem, from_json(tests)) if isinstance(problem, str) and isinstance(tests, str) else None


def _read_leetcode(row: Row) -> tuple[str, Any] | None:
    problem, tests, entry = row.get("problem_description"), row.get("test"), row.get("entry_point")
    if not isinstance(problem, str) or not isinstance(tests, str) or not isinstance(entry, str):
        return None
    prefix = row.get("prompt")
    prefix = prefix if isinstance(prefix, str) else ""
    return problem, {"assert_code": tests, "entry_point": entry, "prefix_code": prefix}


def _read_kodcode(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("question"), row.get("test")
    if not isinstance(problem, str) or not isinstance(tests, str) or not isinstance(row.get("solution"), str):
        return None
    return problem, {"assert_code": tests} if tests.strip() else None


def _read_tests(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("problem"), row.get("tests")
    if not isinstance(problem, str) or tests is None:
        return None
    content = from_json(tests) if isinstance(tests, str) else tests
    if content is None:
        # Code: a text of assertions.
        return problem, {"assert_code": tests} if tests.strip() else None
    if isinstance(content, list) and content and all(isinstance(test, Mapping) for test in content):
        return problem, [_named(test, row) for test in content]
    return problem, content if isinstance(content, Mapping) or not content else {"assert_code": content}


def _named(test: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """A test of a list, with the function that its row names for all of them (LiveCodeBench)."""
    metadata = row.get("metadata")
    metadata = from_json(metadata) if isinstance(metadata, str) else metadata
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return {**test, "fn_name": name} if name and not test.get("fn_name") else dict(test)


def _read_mbpp(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("prompt", row.get("text")), row.get("test_list")
    if not isinstance(problem, str) or not isinstance(tests, list):
        return None
    setup = "\n".join(row.get("test_imports") or ()) or row.get("test_setup_code") or ""
    return problem, {"assert_code": tests, "setup_code": setup} if tests else None


def references(row: Row) -> tuple[str, ...]:
    """Programs that are said to pass, of the first column that has any; APPS and TACO pack their list into text."""
    for key in _REFERENCES:
        value = row.get(key)
        if isinstance(value, str):
            unpacked = from_json(value)
            value = unpacked if isinstance(unpacked, list) else [value]
        if isinstance(value, list) and value and all(isinstance(program, str) for program in value):
            return tuple(program for program in value if program.strip())
    return ()


def from_json(text: str) -> Any:
    """The content of JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
