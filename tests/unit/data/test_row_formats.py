"""Rows of published data sets as questions and demonstrations, and what is no row of any."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_prime.data.row_formats import last_boxed, read_demonstration, read_question
from megatron_prime.errors import DataError

ASK = [{"role": "user", "content": "1+1=?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "reward_model": {"ground_truth": "2"}, "data_source": "x", "ability": "math"},
        {"prompt": "1+1=?", "reward_model": {"ground_truth": "2"}, "data_source": "x"},
        {"question": "1+1=?", "answer": "one and one\n#### 2", "data_source": "x"},
        {"problem": "1+1=?", "solution": r"So \boxed{2}.", "data_source": "x"},
        {"problem": "1+1=?", "expected_answer": 2.0, "data_source": "x"},
        {"question": "1+1=?", "final_answer": ["2"], "data_source": "x"},
        {"prompt": ASK, "label": r"it is \boxed{2}", "data_source": "x"},
        {"messages": ASK, "ground_truth": "2", "dataset": "gsm8k", "data_source": "x"},
        {"0": {"value": "1+1=?"}, "1": {"ground_truth": {"value": "2"}}, "data_source": "x"},
        {"conversation": [{"value": "1+1=?"}, {"ground_truth": {"value": "2"}}], "data_source": "x"},
    ],
    ids=lambda row: ",".join(row),
)
def test_every_format_gives_the_same_question(row: dict[str, Any]) -> None:
    found = read_question(row, "here")
    assert (found.messages, found.ground_truth, found.ability) == (tuple(ASK), "2", "math")
    assert found.data_source == "x"


def test_several_answers_are_one_list_and_a_tolerance_comes_along() -> None:
    found = read_question({"question": "?", "final_answer": ["2", "3"], "error": "0.01"}, "here")
    assert json.loads(found.ground_truth) == ["2", "3"] and found.extra_info == {"tolerance": 0.01}
    assert read_question({"question": "?", "final_answer": ["2"], "error": "small"}, "here").extra_info == {}


def test_a_label_that_says_that_there_is_none_is_kept_apart() -> None:
    found = read_question({"problem": "?", "answer": "Proof"}, "here")
    assert (found.ground_truth, found.label) == ("", "Proof")
    assert read_question({"problem": "?", "solution": "no box"}, "here").ground_truth == ""


@pytest.mark.parametrize(
    ("ability", "expected"), [("MATH", "math"), ("coding", "code"), ("code", "code"), ("logic", "logic")]
)
def test_abilities_have_one_name(ability: str, expected: str) -> None:
    row = {"prompt": ASK, "reward_model": {"ground_truth": {"a": 1}}, "ability": ability}
    if expected == "math":
        row["reward_model"] = {"ground_truth": "2"}
    found = read_question(row, "here")
    assert found.ability == expected
    assert found.ground_truth == ("2" if expected == "math" else '{"a": 1}')


def test_a_name_of_a_data_set_is_no_ability() -> None:
    row = {"prompt": ASK, "label": "2"}
    assert read_question(row | {"task": "gsm8k"}, "here").ability == "math"
    assert read_question(row | {"ability": "code"}, "here").ability == "code"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "1+1=2"}, r"here: unknown layout with columns \(text: str\)"),
        ({"question": " ", "answer": "2"}, "here: the question is empty; remove the row"),
        ({"prompt": "", "label": "2"}, "here: the question is empty; remove the row"),
        ({"question": "?", "answer": True}, "unknown layout"),
        ({"question": "?", "answer": {"value": 2}}, "unknown layout"),
        ({"problem": "?"}, "unknown layout"),
        ({"prompt": [{"role": "user"}], "label": "2"}, "unknown layout"),
        ({"prompt": ASK, "reward_model": {}}, "unknown layout"),
    ],
)
def test_what_is_no_question_is_named_with_its_columns(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_question(row, "here")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASK, {"role": "assistant", "content": "2"}]},
        {"prompt": "1+1=?", "response": "2"},
        {"prompt": ASK, "response": "2"},
        {"question": "1+1=?", "answer": "2"},
        {"problem": "1+1=?", "solution": "2"},
    ],
    ids=lambda row: ",".join(row),
)
def test_every_supervised_format_gives_the_same_demonstration(row: dict[str, Any]) -> None:
    found = read_demonstration(row, "here")
    assert (found.messages, found.response) == (tuple(ASK), "2")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASK},
        {"messages": [{"role": "assistant", "content": "2"}]},
        {"messages": []},
        {"prompt": "1+1=?", "response": ""},
        {"question": "1+1=?"},
    ],
)
def test_what_is_no_demonstration_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"here: unknown layout .* expected messages"):
        read_demonstration(row, "here")


@pytest.mark.parametrize(
    ("solution", "content"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{ 3 }", "3"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\}}", r"\}"),
        ("no box", ""),
    ],
)
def test_the_last_whole_box_of_a_solution(solution: str, content: str) -> None:
    assert last_boxed(solution) == content
