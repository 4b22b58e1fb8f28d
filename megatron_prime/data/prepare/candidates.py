"""Rows of the data sets that PRIME was made from, in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime.data.row_formats import PROMPT_FORMATS, Row, read_question
from megatron_prime.data.templates import TASK_SUFFIXES, complete_messages
from megatron_prime.errors import DataError

LAYOUTS = (
    f"{PROMPT_FORMATS}; or code: APPS and TACO (question, input_output, solutions), problem + tests + solutions, or "
    "MBPP (prompt, test_list, code)"
)
_REFERENCES = ("solutions", "solution", "code", "canonical_solution", "completion")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A problem before and after cleaning."""

    where: str
    problem: str
    """Without system prompt and task suffix."""
    ground_truth: str
    ability: str
    data_source: str
    references: tuple[str, ...] = ()
    """Programs that are said to pass the tests."""

    def row(self, split: str, index: int) -> dict[str, Any]:
        """In the schema of Eurus-2-RL-Data."""
        messages = complete_messages(
            [{"role": "user", "content": self.problem}], ability=self.ability, system_prompt="prime", task_suffix=True
        )
        return {
            "data_source": self.data_source,
            "prompt": messages,
            "ability": self.ability,
            "reward_model": {"style": "rule", "ground_truth": self.ground_truth},
            "extra_info": {"split": split, "index": index},
        }


def read_candidate(row: Row, where: str) -> Candidate:
    """Reads a row of any layout.

    Args:
        row: column names to values.
        where: file and row.

    Raises:
        DataError: the row has none of the layouts.
    """
    source = str(row.get("data_source") or row.get("source") or _stem(where))
    for read in (_read_apps, _read_tests, _read_mbpp):
        found = read(row)
        if found is not None:
            problem, truth = found
            return Candidate(
                where=where,
                problem=problem,
                ground_truth=json.dumps(truth) if truth else "",
                ability="code",
                data_source=source,
                references=_references(row),
            )
    try:
        question = read_question(row, where)
    except DataError as error:
        raise DataError(f"{where}: unknown layout with columns ({', '.join(row)}); expected {LAYOUTS}") from error
    return Candidate(
        where=where,
        problem=_without_suffix(question.messages[-1]["content"], question.ability),
        ground_truth=question.ground_truth,
        ability=question.ability,
        data_source=source,
        references=_references(question.extra_info) if question.ability == "code" else (),
    )


def _read_apps(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("question"), row.get("input_output")
    return (problem, _json(tests)) if isinstance(problem, str) and isinstance(tests, str) else None


def _read_tests(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("problem"), row.get("tests")
    if not isinstance(problem, str) or tests is None:
        return None
    content = _json(tests) if isinstance(tests, str) else tests
    return problem, content if isinstance(content, Mapping) else {"assert_code": tests}


def _read_mbpp(row: Row) -> tuple[str, Any] | None:
    problem, tests = row.get("prompt", row.get("text")), row.get("test_list")
    if not isinstance(problem, str) or not isinstance(tests, list):
        return None
    setup = "\n".join(row.get("test_imports") or ()) or row.get("test_setup_code") or ""
    return problem, {"assert_code": tests, "setup_code": setup} if tests else None


def _references(row: Row) -> tuple[str, ...]:
    """Of the first column that has any; APPS and TACO pack their list into text."""
    for key in _REFERENCES:
        value = row.get(key)
        if isinstance(value, str):
            unpacked = _json(value)
            value = unpacked if isinstance(unpacked, list) else [value]
        if isinstance(value, list) and value and all(isinstance(program, str) for program in value):
            return tuple(program for program in value if program.strip())
    return ()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without_suffix(content: str, ability: str) -> str:
    return content.removesuffix(TASK_SUFFIXES.get(ability, "")).strip()


def _stem(where: str) -> str:
    return Path(where.rpartition(", row ")[0]).name.split(".")[0]
