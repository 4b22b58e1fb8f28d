"""Rows of every layout through all cleaning steps, and the files that come out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_prime.data.prepare.candidates import read_candidate
from megatron_prime.data.prepare.contamination import Contamination
from megatron_prime.data.prepare.output import check_output, write_rows
from megatron_prime.data.prepare.pipeline import Cleaner, CleaningOptions
from megatron_prime.data.readers import read_rows
from megatron_prime.data.row_formats import read_question
from megatron_prime.data.templates import PRIME_SYSTEM_PROMPT, TASK_SUFFIXES
from megatron_prime.errors import DataError

DATA = Path(__file__).resolve().parents[3] / "data"
GSM8K = str(DATA / "gsm8k" / "train.jsonl")
ADD = {"problem": "Print the sum of two numbers.", "tests": {"inputs": ["1 2\n"], "outputs": ["3\n"]}}
PROGRAM = "print(sum(map(int, input().split())))"


def math(problem: str, answer: Any = "1", **columns: Any) -> dict[str, Any]:
    return {"problem": problem, "answer": answer, **columns}


def cleaned(rows: Iterable[dict[str, Any]], cleaner: Cleaner) -> list[str]:
    numbered = ((f"raw.jsonl, row {number}", row) for number, row in enumerate(rows))
    return [candidate.where.removeprefix("raw.jsonl, row ") for candidate in cleaner.clean(numbered)]


def test_every_step_counts_what_it_drops() -> None:
    problem = (
        "How many of the first 100 positive integers are divisible by both 3 and 4, and by no other number below 9?"
    )
    rows = [
        math(problem, "8"),
        math(problem.upper() + "\n", "9"),
        math(problem.replace("How many", "Exactly how many"), "8"),
        math(problem.replace("100", "200"), "16"),
        math("In the figure, what is x?"),
        math("Prove that 1 = 1."),
        math("Fill in: $\\underline{\\quad}$"),
        math("Which of them is right?\n(A) 1\n(B) 2\n(C) 3", "A"),
        math("What is 1+1?\n(A) 1\n(B) 2\n(C) 3", "B", source="amc"),
        math("What is 2+2?", None),
        {"problem": "What is 3+3?", "solution": "It is six."},
        math("Some benchmark problem with just enough words to be recognised.", "4"),
    ]
    cleaner = Cleaner(CleaningOptions(), Contamination([("math500/7", rows[-1]["problem"])]))
    assert cleaned(rows, cleaner) == ["0", "3", "8"]
    report = cleaner.report.as_dict()
    assert report["dropped"] == {
        "no_answer": 2,
        "figure": 1,
        "proof": 1,
        "fill_in_blank": 1,
        "choice_needed": 1,
        "duplicate": 1,
        "near_duplicate": 1,
        "contaminated": 1,
    }
    assert report["examples"]["duplicate"] == ["raw.jsonl, row 1: raw.jsonl, row 0"]
    assert report["examples"]["contaminated"] == ["raw.jsonl, row 11: math500/7"]
    assert (report["num_rows"], report["num_kept"], report["num_choices_opened"]) == (12, 3, 1)
    assert report["by_source"] == {"amc": {"rows": 1, "kept": 1}, "raw": {"rows": 11, "kept": 2}}


def test_choices_can_be_left_out() -> None:
    cleaner = Cleaner(CleaningOptions(multiple_choice="drop"))
    assert cleaned([math("What is 1+1?\n(A) 1\n(B) 2\n(C) 3", "B"), math("What is 1+1?", "2")], cleaner) == ["1"]
    assert cleaner.report.as_dict()["dropped"] == {"choice": 1}


@pytest.mark.parametrize(
    ("mode", "kept", "dropped"),
    [
        ("run", ["0", "2"], {"reference_failed": 1}),
        ("require", ["0"], {"no_reference": 1, "reference_failed": 1}),
        ("ignore", ["0", "1", "2"], {}),
    ],
)
def test_reference_programs_must_pass(mode: Any, kept: list[str], dropped: dict[str, int]) -> None:
    def run(programs: Any) -> list[str]:
        assert all(program != "never run" for _, program in programs)
        return ["pass" if program == PROGRAM else "wrong_answer" for _, program in programs]

    rows = [
        ADD | {"solutions": ["print(4)", PROGRAM, "never run"]},
        ADD | {"problem": "Print their product.", "solutions": ["print(3)"]},
        ADD | {"problem": "Print something else."},
    ]
    cleaner = Cleaner(CleaningOptions(references=mode), None, run)
    assert cleaned(rows, cleaner) == kept
    report = cleaner.report.as_dict()
    assert report["dropped"] == dropped and report["num_references_passed"] == (mode != "ignore")
    if dropped:
        assert report["examples"]["reference_failed"] == ["raw.jsonl, row 1: wrong_answer"]


def eurus(ability: str, problem: str, truth: str, **extra: Any) -> dict[str, Any]:
    user = {"role": "user", "content": problem + TASK_SUFFIXES[ability]}
    return {
        "data_source": "taco",
        "prompt": [{"role": "system", "content": "be good"}, user],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 5} | extra,
    }


@pytest.mark.parametrize(
    ("row", "problem", "truth", "references"),
    [
        (math("What is $1$?", 1.0), "What is $1$?", "1", ()),
        ({"question": "2?", "answer": "Two.\n#### 2"}, "2?", "2", ()),
        (eurus("math", "3?", "3", solution="not a program"), "3?", "3", ()),
        (eurus("code", "Add.", '{"inputs": [], "outputs": []}', solution=PROGRAM), "Add.", None, (PROGRAM,)),
        (ADD | {"solutions": PROGRAM}, ADD["problem"], json.dumps(ADD["tests"]), (PROGRAM,)),
        (ADD | {"tests": "assert f(1) == 2"}, ADD["problem"], '{"assert_code": "assert f(1) == 2"}', ()),
        (
            {"question": "Add.", "input_output": json.dumps(ADD["tests"]), "solutions": json.dumps([PROGRAM, " "])},
            "Add.",
            json.dumps(ADD["tests"]),
            (PROGRAM,),
        ),
        ({"question": "Add.", "input_output": "", "solutions": ""}, "Add.", "", ()),
    ],
)
def test_layouts(row: dict[str, Any], problem: str, truth: str | None, references: tuple[str, ...]) -> None:
    candidate = read_candidate(row, "file.json, row 3")
    assert candidate.problem == problem and candidate.references == references
    assert truth is None or candidate.ground_truth == truth
    assert candidate.data_source == row.get("data_source", "file")


def test_mbpp_as_published() -> None:
    for where, row in read_rows(str(DATA / "benchmarks" / "mbpp" / "new_mbpp.json")):
        candidate = read_candidate(row, where)
        truth = json.loads(candidate.ground_truth)
        assert candidate.references == (row["code"],) and candidate.data_source == "new_mbpp"
        assert truth == {"assert_code": row["test_list"], "setup_code": "\n".join(row["test_imports"])}


def test_an_unknown_layout_is_an_error() -> None:
    with pytest.raises(DataError, match=r"x, row 1: unknown layout with columns \(text\); expected Eurus"):
        read_candidate({"text": "?"}, "x, row 1")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_output_is_read_as_training_data(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    check_output(path)
    kept = list(Cleaner(CleaningOptions()).clean(read_rows(GSM8K)))
    write_rows(path, iter(kept), "train")
    rows = [row for _, row in read_rows(str(path))]
    assert len(rows) == len(kept) > 20
    for index, (row, candidate) in enumerate(zip(rows, kept, strict=True)):
        assert row == candidate.row("train", index)
        assert row["prompt"][0] == {"role": "system", "content": PRIME_SYSTEM_PROMPT}
        assert row["prompt"][1]["content"] == candidate.problem + TASK_SUFFIXES["math"]
        question = read_question(row, name)
        assert (question.ground_truth, question.data_source) == (candidate.ground_truth, "train")
    if name.endswith("parquet"):
        assert pq.read_schema(path).names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    # What was prepared once has nothing left to clean.
    again = Cleaner(CleaningOptions())
    assert [c.row("train", i) for i, c in enumerate(again.clean(read_rows(str(path))))] == rows
    assert again.report.as_dict()["dropped"] == {}


def test_an_error_on_the_way_leaves_no_file(tmp_path: Path) -> None:
    rows = chain(read_rows(GSM8K), [("bad, row 0", {"text": "?"})])
    with pytest.raises(DataError, match="bad, row 0"):
        write_rows(tmp_path / "rows.jsonl", Cleaner(CleaningOptions()).clean(rows), "train")
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.jsonl or \.parquet"):
        check_output(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match="exists already"):
        check_output(tmp_path / "rows.jsonl")
