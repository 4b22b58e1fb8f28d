"""Benchmarks in their published layouts: what is asked, what is expected, what is said of a wrong folder."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import zlib
from pathlib import Path

import pytest

from megatron_prime.errors import DataError
from megatron_prime.evaluation.registry import BENCHMARKS, available, load_benchmarks

DATA = Path(__file__).resolve().parents[2] / "data" / "benchmarks"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(DATA, tmp_path / "benchmarks")


def questions(name: str, folder: Path = DATA) -> list[tuple[str, str]]:
    """What is asked and expected, and that ids count the problems."""
    rows = load_benchmarks(folder, [name])[name]
    assert [prompt_id for prompt_id, _ in rows] == [f"{name}/{n}" for n in range(len(rows))]
    assert all([m["role"] for m in q.messages] == ["user"] for _, q in rows)
    return [(q.messages[0]["content"], q.ground_truth) for _, q in rows]


def test_every_benchmark_of_a_folder_is_found() -> None:
    assert available(DATA) == list(BENCHMARKS)
    found = load_benchmarks(DATA, list(BENCHMARKS))
    assert {name: len(rows) for name, rows in found.items()} == {
        "aime24": 2,
        "amc23": 2,
        "amc": 2,
        "math500": 3,
        "minerva_math": 2,
        "olympiadbench": 3,
        "gsm8k": 2,
        "humaneval": 3,
        "mbpp": 4,
        "leetcode": 2,
        "livecodebench": 2,
    }
    code = {name for name, rows in found.items() if {question.ability for _, question in rows} == {"code"}}
    assert code == {"humaneval", "mbpp", "leetcode", "livecodebench"}


def test_aime_of_other_years_is_left_out() -> None:
    rows = [json.loads(line) for line in (DATA / "aime24" / "aimo-validation-aime.jsonl").read_text().splitlines()]
    assert [row["url"].count("2024") for row in rows].count(0) == 1
    expected = [(row["question"], row["answer"]) for row in rows if "2024" in row["url"]]
    assert questions("aime24") == expected


def test_answers_that_are_floats_are_read_as_integers() -> None:
    for name in ("amc", "amc23"):
        assert all(truth.isdigit() for _, truth in questions(name))


def test_answers_of_minerva_are_in_the_solutions_box() -> None:
    rows = [json.loads(line) for line in (DATA / "minerva_math" / "minerva_test.jsonl").read_text().splitlines()]
    for (asked, truth), row in zip(questions("minerva_math"), rows, strict=True):
        assert asked == row["problem"] and f"\\boxed{{{truth}}}" in row["solution"]


def test_tolerance_of_olympiadbench_is_handed_on() -> None:
    rows = load_benchmarks(DATA, ["olympiadbench"])["olympiadbench"]
    assert [question.extra_info for _, question in rows] == [{}, {}, {"tolerance": 0.1}]
    assert rows[2][1].ground_truth == "4.2"


def test_humaneval_is_asked_by_its_signature() -> None:
    for asked, truth in questions("humaneval"):
        tests = json.loads(truth)
        assert tests["prefix_code"] in asked and f"def {tests['entry_point']}(" in tests["prefix_code"]
        signature = asked.split("Write a Python function `")[1].split("` to solve")[0]
        assert f"def {signature}:" in tests["prefix_code"]
        assert "def check(candidate)" in tests["assert_code"]


def test_mbpp_keeps_the_whole_name_of_the_function() -> None:
    rows = json.loads((DATA / "mbpp" / "new_mbpp.json").read_text())
    for (asked, truth), row in zip(questions("mbpp"), rows, strict=True):
        signature = asked.split("Write a Python function `")[1].split("` to solve")[0]
        name = signature.split("(")[0]
        assert f"def {name}" in row["code"] and name in row["test_list"][0]
        assert "https://" not in asked and f">>> {row['test_list'][0]}\n" in asked
        tests = json.loads(truth)
        assert tests["assert_code"] == row["test_list"] and tests["setup_code"] == "\n".join(row["test_imports"])
    assert any(row["test_imports"] for row in rows) and any("https://" in row["prompt"] for row in rows)


def test_leetcode_is_one_row_per_line_in_a_json_file() -> None:
    for asked, truth in questions("leetcode"):
        assert "class Solution:" in asked
        assert json.loads(truth)["assert_code"].startswith("\nmy_solution = Solution()")


def test_livecodebench_joins_public_and_packed_tests_inside_the_window() -> None:
    (total, total_tests), (asked, tests) = reversed(questions("livecodebench"))
    assert json.loads(tests) == {"inputs": ["2 3\n", "-1 1\n"], "outputs": ["5\n", "0\n"]}
    assert "Print 1." not in asked and asked.startswith("### Question:\nRead two integers")
    assert json.loads(total_tests)["fn_name"] == "total" and "def total(self" in total


def test_a_pickle_that_names_anything_is_refused(copy: Path) -> None:
    file = copy / "livecodebench" / "test.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"names builtins\.print"):
        load_benchmarks(copy, ["livecodebench"])


def test_all_that_is_wrong_with_a_folder_is_said_at_once(copy: Path) -> None:
    shutil.rmtree(copy / "gsm8k")
    (copy / "mbpp" / "new_mbpp.json").write_text('[{"prompt": "?"}]')
    (copy / "minerva_math" / "minerva_test.jsonl").write_text('{"problem": "1+1?", "solution": "two"}\n')
    (copy / "humaneval" / "HumanEval.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(DataError) as raised:
        load_benchmarks(copy, ["gsm8k", "aime", "mbpp", "minerva_math", "humaneval", "math500"])
    lines = str(raised.value).splitlines()
    assert lines[0] == f"gsm8k: {copy} has no gsm8k/test.jsonl"
    assert lines[1].startswith("aime: unknown benchmark; did you mean 'aime24'? (known: aime24, amc23")
    assert lines[2].startswith(f"{copy}/mbpp/new_mbpp.json, row 0: code must be text")
    assert lines[3].startswith(f"{copy}/minerva_math/minerva_test.jsonl, row 0: no answer")
    assert lines[4].startswith(f"{copy}/humaneval/HumanEval.jsonl.gz: damaged gzip file")
    assert lines[5].startswith(f"{copy} has: aime24, amc23, amc, math500, minerva_math, ") and len(lines) == 6


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_benchmarks(tmp_path / "nowhere", ["gsm8k"])
    with pytest.raises(DataError, match="has: no benchmark"):
        load_benchmarks(tmp_path, ["gsm8k"])
