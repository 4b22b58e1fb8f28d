"""Rows of popular data sets as they are published: read, or left out with the value that was met."""

import json
import logging

import pytest

from megatron_prime.config.schema import FileData
from megatron_prime.data.files import FilePrompts
from megatron_prime.data.prepare.candidates import read_candidate
from megatron_prime.data.readers import read_rows
from megatron_prime.data.row_formats import read_question
from megatron_prime.interfaces import DropCounts

ASKED = "How many divisors has 28?"
MESSAGES = [{"role": "user", "content": ASKED}]
KODCODE = {
    "question": "Write add.",
    "solution": "def add(a, b):\n    return a + b",
    "test": "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n",
}


def verl(ability, truth, prompt=MESSAGES, **columns):
    return {"prompt": prompt, "ability": ability, "reward_model": {"ground_truth": truth}, **columns}


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        (verl("MATH", "6", data_source="math_dapo"), "6"),
        (verl("math", '["6"]', data_source="train-math-numinamath1.5_olympiads"), '["6"]'),
        (verl("MATH", "6", prompt=ASKED, solution="6"), "6"),
        (verl("Mathematics", 6.0), "6"),
        ({"problem": ASKED, "solution": "..", "answer": "6", "question_type": "math-word-problem"}, "6"),
        ([{"from": "human", "value": ASKED}, {"from": "assistant", "ground_truth": {"value": "6"}}], "6"),
        ({"0": {"from": "human", "value": ASKED}, "1": {"from": "assistant", "ground_truth": {"value": "6"}}}, "6"),
        ({"question": ASKED, "final_answer": "6", "difficulty": 3.0, "r1_solution_1": ".."}, "6"),
        ({"messages": MESSAGES, "ground_truth": "6", "dataset": "MATH"}, "6"),
        ({"prompt": MESSAGES, "solution": "$6$ since \\boxed{6}"}, "6"),
        ({"prompt": ASKED, "label": "6"}, "6"),
        ({"prompt": MESSAGES, "label": "6", "metadata": {}}, "6"),
        ({"prompt": MESSAGES, "answer": "6", "info": {}, "task": "gsm8k"}, "6"),
        ({"question": ASKED, "final_answer": ["6"], "solution": [".."], "error": None}, "6"),
        ({"question": ASKED, "final_answer": ["6", "7"], "is_multiple_answer": True}, '["6", "7"]'),
    ],
)
def test_math_rows_are_read(tmp_path, row, truth):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ((where, read),) = read_rows(str(path))
    question = read_question(read, where)
    assert (question.ground_truth, question.ability) == (truth, "math")
    assert question.messages[-1]["content"] == ASKED
    assert read_candidate(read, where).ground_truth == truth


def test_a_stated_error_is_a_tolerance():
    question = read_question({"question": ASKED, "final_answer": ["6.1"], "error": "0.1"}, "row 0")
    assert question.extra_info == {"tolerance": 0.1}


@pytest.mark.parametrize(
    ("row", "tests"),
    [
        ({"question": "q", "input_output": '{"inputs": ["1"], "outputs": ["2"]}', "solutions": '["print(2)"]'},
         {"inputs": ["1"], "outputs": ["2"]}),
        ({"problem": "q", "tests": '[{"input": "1", "output": "2", "testtype": "stdin"}]', "starter_code": ""},
         [{"input": "1", "output": "2", "testtype": "stdin"}]),
        ({"problem": "q", "tests": [{"input": "1", "output": "2", "testtype": "functional"}],
          "metadata": '{"func_name": "f"}'},
         [{"input": "1", "output": "2", "testtype": "functional", "fn_name": "f"}]),
        ({"problem": "q", "tests": '["assert f(1) == 2"]'}, {"assert_code": ["assert f(1) == 2"]}),
        ({"problem": "q", "tests": "assert f(1) == 2"}, {"assert_code": "assert f(1) == 2"}),
        (KODCODE, {"assert_code": KODCODE["test"]}),
        ({"problem_description": "q", "test": "def check(candidate): ..", "entry_point": "Solution().f",
          "prompt": "from typing import *", "completion": "class Solution: .."},
         {"assert_code": "def check(candidate): ..", "entry_point": "Solution().f",
          "prefix_code": "from typing import *"}),
    ],
)  # fmt: skip
def test_rows_with_programs_are_read(row, tests):
    for question in (read_question(row, "row 0"), read_candidate(row, "row 0")):
        assert question.ability == "code" and json.loads(question.ground_truth) == tests


def test_the_signature_that_is_asked_for_belongs_to_the_question():
    row = {
        "question": "Add.",
        "input_output": '{"inputs": [[1]], "outputs": [1], "fn_name": "f"}',
        "starter_code": "def f(x):",
    }
    assert read_question(row, "row 0").messages[-1]["content"] == "Add.\n\ndef f(x):"


def test_rows_left_out_name_what_they_had(tmp_path, caplog, tokenizer):
    rows = [
        {"problem": ASKED, "answer": "6"},
        {"problem": "Show it.", "answer": "proof", "question_type": "proof"},
        {"problem": "List them.", "answer": "notfound"},
        {"problem": "List more.", "answer": "notfound"},
        {"messages": MESSAGES, "ground_truth": "{}", "dataset": "ifeval"},
        KODCODE,
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        prompts = FilePrompts(FileData(train=[str(path)], template="raw"), tokenizer, seed=1)
    assert len(prompts) == 1
    assert "'notfound' 2, 'proof' 1" in caplog.text
    assert "data.abilities ('ifeval' 1, 'code' 1)" in caplog.text


def test_many_values_are_cut_short():
    counts = DropCounts(
        num_rows=9, by_reason={"other_ability": 9}, by_value={"other_ability": {f"a{n}": 1 for n in range(9)}}
    )
    assert str(counts).endswith("('a0' 1, 'a1' 1, 'a2' 1, 'a3' 1, 'a4' 1, ..)")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*symbols, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
