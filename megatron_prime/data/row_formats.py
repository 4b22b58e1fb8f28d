"""The formats of dataset rows, and what is read from each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_prime.data.code_layouts import CODE_LAYOUTS, read_code
from megatron_prime.data.templates import Message
from megatron_prime.errors import DataError

Row = Mapping[str, Any]

PROMPT_FORMATS = (
    "Eurus-2-RL-Data, DAPO and Skywork-OR1 (prompt: messages or text, reward_model: {ground_truth}, and optionally "
    "data_source, ability, extra_info), GSM8K (question, answer with '#### 42'), MATH and NuminaMath (problem, and "
    "answer, expected_answer, or solution with \\boxed{..}), DeepMath and OlympiadBench (question, final_answer), "
    "TRL, slime and verifiers (prompt, and ground_truth, label, answer or solution), Tulu (messages, ground_truth), "
    f"ORZ (a list of two turns); or code: {CODE_LAYOUTS}"
)
NO_ANSWERS = ("proof", "notfound", "not found", "n/a")
"""Labels that say that there is none (NuminaMath-1.5)."""
ABILITIES = {"mathematics": "math", "maths": "math", "coding": "code", "programming": "code", "codegen": "code"}
"""Other names of abilities; upper case makes no difference."""
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
    label: str = ""
    """What stands where an answer should, where that is none."""


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
    if found := read_code(row):
        user: Message = {"role": "user", "content": found.text}
        extra = {"solutions": list(found.references)}
        return Question(
            messages=(user,),
            ground_truth=found.ground_truth,
            ability="code",
            data_source=_source(row),
            extra_info=extra,
        )
    for read in (_read_orz, _read_labelled):
        if (question := read(row, where)) is not None:
            return question
    asked = row.get("problem", row.get("question"))
    if not isinstance(asked, str):
        raise _unknown(where, PROMPT_FORMATS, row)
    if not asked.strip():
        raise DataError(f"{where}: the question is empty; remove the row")
    key = next((key for key in ("answer", "expected_answer", "final_answer") if row.get(key) is not None), "")
    if not key:
        solution = row.get("solution", "")
        known = {"answer", "expected_answer", "final_answer", "solution"} & row.keys()
        if not isinstance(solution, str | None) or not known:
            raise _unknown(where, PROMPT_FORMATS, row)
        answer: Any = last_boxed(solution or "")
    else:
        answer = row[key]
    return _math_question(({"role": "user", "content": asked},), answer, row, where)


def _math_question(messages: tuple[Message, ...], answer: Any, row: Row, where: str) -> Question:
    """A question with its label, which may be a list of several answers."""
    if isinstance(answer, list | tuple) and all(isinstance(item, str) for item in answer):
        # OlympiadBench; several answers are one list, in any order.
        answer = answer[0] if len(answer) == 1 else json.dumps(list(answer)) if answer else ""
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise _unknown(where, PROMPT_FORMATS, row)
    text = _final_answer(answer)
    is_none = text.strip().casefold() in NO_ANSWERS
    return Question(
        messages=messages,
        ground_truth="" if is_none else text,
        data_source=_source(row),
        extra_info=_tolerance(row),
        label=text if is_none else "",
    )


def _tolerance(row: Row) -> dict[str, Any]:
    """OlympiadBench states by how much some answers may be off."""
    try:
        return {"tolerance": float(row["error"])} if row.get("error") and "final_answer" in row else {}
    except (TypeError, ValueError):
        return {}


def _source(row: Row) -> str:
    return str(row.get("data_source") or "")


def _read_orz(row: Row, where: str) -> Question | None:
    """Two turns, the second of which holds nothing but the truth; as a list, or in columns 0 and 1."""
    turns = row.get("conversation", [row.get("0"), row.get("1")])
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    truth = turns[1].get("ground_truth")
    if not isinstance(turns[0].get("value"), str) or not isinstance(truth, Mapping) or "value" not in truth:
        return None
    return _math_question(({"role": "user", "content": turns[0]["value"]},), truth["value"], row, where)


def _read_labelled(row: Row, where: str) -> Question | None:
    """A prompt (messages or text) with its label in another column: TRL, slime, verifiers, Tulu."""
    asked = row.get("prompt", row.get("messages"))
    key = next((key for key in ("ground_truth", "label", "answer", "solution") if row.get(key) is not None), None)
    if asked is None or key is None or row.get("response") is not None:
        return None
    messages = _read_prompt(asked, where, row)
    if messages[-1]["role"] == "assistant":
        return None
    ability = _ability(str(row.get("ability") or row.get("task") or row.get("dataset") or "math"))
    if ability not in ("math", "code", "ifeval"):
        # Names of data sets and tasks are no abilities.
        ability = "math"
    if ability != "math":
        truth = row[key] if isinstance(row[key], str) else json.dumps(row[key])
        return Question(messages=messages, ground_truth=truth, ability=ability, data_source=_source(row))
    label = row[key]
    boxed = last_boxed(label) if isinstance(label, str) else ""
    return _math_question(messages, boxed or label, row, where)


def _read_prompt(asked: Any, where: str, row: Row) -> tuple[Message, ...]:
    if isinstance(asked, str):
        if not asked.strip():
            raise DataError(f"{where}: the question is empty; remove the row")
        return ({"role": "user", "content": asked},)
    return _read_messages(asked, where, PROMPT_FORMATS, row)


def _ability(name: str) -> str:
    lowered = name.strip().lower()
    return ABILITIES.get(lowered, lowered)


def _read_eurus(row: Row, where: str) -> Question:
    reward_model, named = row["reward_model"], row.get("ability") or "math"
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model or not isinstance(named, str):
        raise _unknown(where, PROMPT_FORMATS, row)
    truth, ability = reward_model["ground_truth"], _ability(named)
    messages = _read_prompt(row["prompt"], where, row)
    extra_info = row.get("extra_info")
    extra = dict(extra_info) if isinstance(extra_info, Mapping) else {}
    if ability != "math":
        # Tests of programs may hold any text.
        text = truth if isinstance(truth, str) else json.dumps(truth)
        return Question(
            messages=messages, ground_truth=text, ability=ability, data_source=_source(row), extra_info=extra
        )
    found = _math_question(messages, "" if truth is None else truth, row, where)
    return replace(found, extra_info={**found.extra_info, **extra})


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
