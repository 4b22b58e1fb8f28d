"""Rows of the data sets that PRIME was made from, in one form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime.data.code_layouts import read_code, references
from megatron_prime.data.row_formats import PROMPT_FORMATS, Row, read_question
from megatron_prime.data.templates import TASK_SUFFIXES, complete_messages
from megatron_prime.errors import DataError

LAYOUTS = PROMPT_FORMATS


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
    label: str = ""
    """What stands where an answer should, where that is none."""

    def row(self, split: str, index: int) -> dict[str, Any]:
        """Returns the row in the schema of Eurus-2-RL-Data."""
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
    found = read_code(row)
    if found is not None:
        return Candidate(
            where=where,
            problem=found.text,
            ground_truth=found.ground_truth,
            ability="code",
            data_source=source,
            references=found.references,
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
        references=references(question.extra_info) if question.ability == "code" else (),
        label=question.label,
    )


def _without_suffix(content: str, ability: str) -> str:
    return content.removesuffix(TASK_SUFFIXES.get(ability, "")).strip()


def _stem(where: str) -> str:
    return Path(where.rpartition(", row ")[0]).name.split(".")[0]
