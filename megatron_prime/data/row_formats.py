"""The formats of dataset rows, and what is read from each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_prime.data.templates import Message
from megatron_prime.errors import DataError

Row = Mapping[str, Any]

PROMPT_FORMATS = (
    "Eurus-2-RL-Data (prompt: list of messages, reward_model: {ground_truth}, and optionally data_source, ability, "
    "extra_info), GSM8K (question, answer with '#### 42'), or MATH (problem, and answer, expected_answer, or "
    "solution with \\boxed{..})"
)
SFT_FORMATS = (
    "messages (the last by the assistant), prompt + response, GSM8K (question, answer), or MATH (problem, solution)"
)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt before templates."""

    messages: tuple[Message, ...]
    ground_truth: str
    """Empty where the row has none."""
    ability: str = "math"
    data_source: str = ""
    extra_info: Row = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A conversation with the answer to imitate."""

    messages: tuple[Message, ...]
    response: str
    ability: str = "math"


def read_question(row: Row, where: str) -> Question:
    """Reads a row of any prompt layout.

    Args:
        row: column names to values.
        where: file and row, for the error message.

    Returns:
        The question and its ground truth.

    Raises:
        DataError: the row has none of the formats.
    """
    if "reward_model" in row and "prompt" in row:
        return _read_eurus(row, where)
    asked = row.get("problem", row.get("question"))
    if not isinstance(asked, str):
        raise _unknown(where, PROMPT_FORMATS, row)
    if not asked.strip():
        raise DataError(f"{where}: the question is empty; remove the row")
    answer = row.get("answer", row.get("expected_answer"))
    if answer is None:
        solution = row.get("solution", "")
        if not isinstance(solution, str | None) or not {"answer", "expected_answer", "solution"} & row.keys():
            raise _unknown(where, PROMPT_FORMATS, row)
        answer = last_boxed(solution or "")
    elif not isinstance(answer, (str, int, float)):
        raise _unknown(where, PROMPT_FORMATS, row)
    return Question(messages=({"role": "user", "content": asked},), ground_truth=_final_answer(answer))


def _read_eurus(row: Row, where: str) -> Question:
    reward_model, ability = row["reward_model"], row.get("ability", "math")
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model or not isinstance(ability, str):
        raise _unknown(where, PROMPT_FORMATS, row)
    extra_info = row.get("extra_info")
    return Question(
        messages=_read_messages(row["prompt"], where, PROMPT_FORMATS, row),
        # Tests of programs may hold any text.
        ground_truth=(str if ability == "code" else _final_answer)(reward_model["ground_truth"]),
        ability=ability,
        data_source=str(row.get("data_source") or ""),
        extra_info=dict(extra_info) if isinstance(extra_info, Mapping) else {},
    )


def read_demonstration(row: Row, where: str) -> Demonstration:
    """Reads a row of any supervised layout; arguments and errors as in `read_question`."""
    if "messages" in row:
        messages = _read_messages(row["messages"], where, SFT_FORMATS, row)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise _unknown(where, SFT_FORMATS, row)
        return Demonstration(messages=messages[:-1], response=messages[-1]["content"])
    for asked_key, answered_key in (("prompt", "response"), ("problem", "solution"), ("question", "answer")):
        asked, answered = row.get(asked_key), row.get(answered_key)
        if asked is None or not isinstance(answered, str) or not answered:
            continue
        if isinstance(asked, str):
            return Demonstration(messages=({"role": "user", "content": asked},), response=answered)
        return Demonstration(messages=_read_messages(asked, where, SFT_FORMATS, row), response=answered)
    raise _unknown(where, SFT_FORMATS, row)


def _read_messages(value: Any, where: str, formats: str, row: Row) -> tuple[Message, ...]:
    messages = list(value) if isinstance(value, (list, tuple)) else []
    whole = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not messages or not whole:
        raise _unknown(where, formats, row)
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _final_answer(answer: str | int | float | None) -> str:
    if isinstance(answer, str):
        return answer.rpartition("####")[2].strip()
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    return "" if answer is None or answer != answer else str(answer)


def _unknown(where: str, formats: str, row: Row) -> DataError:
    columns = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.items())
    return DataError(f"{where}: unknown layout with columns ({columns}); expected {formats}")


def last_boxed(solution: str) -> str:
    """Content of the last complete `\\boxed{..}` of a reference solution, empty where there is none."""
    for box in reversed(list(_BOX.finditer(solution))):
        depth = 1
        for brace in _BRACE.finditer(solution, box.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return solution[box.end() : brace.start()].strip()
    return ""
