"""`prepare` from the command line, with real reference programs run against real tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prime.commands.main import main
from megatron_prime.data.readers import read_rows

DATA = Path(__file__).resolve().parents[1] / "data"
MBPP = DATA / "benchmarks" / "mbpp" / "new_mbpp.json"
GSM8K = DATA / "gsm8k"


def test_math_and_code_are_cleaned_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw, out = tmp_path / "raw.json", tmp_path / "clean.parquet"
    rows = json.loads(MBPP.read_text())
    broken = rows[0]["code"].replace("return", "return None and")
    raw.write_text(json.dumps([rows[0] | {"code": broken}, *rows[1:]]))
    bench = tmp_path / "benchmarks" / "gsm8k"
    bench.mkdir(parents=True)
    (bench / "test.jsonl").write_text(next(line for line in (GSM8K / "test.jsonl").open()))
    sources = [str(GSM8K / "train.jsonl"), str(GSM8K / "test.jsonl"), str(raw)]
    command = ["prepare", *sources, str(out), "--benchmarks", str(bench.parent), "--num-workers", "1"]
    assert main(command) == 0
    report = json.loads((tmp_path / "clean.parquet.report.json").read_text())
    kept = [row for _, row in read_rows(str(out))]
    assert report["num_rows"] == sum(1 for source in sources for _ in read_rows(source))
    assert report["num_kept"] == len(kept) == report["num_rows"] - sum(report["dropped"].values())
    assert report["dropped"]["contaminated"] == 1 and report["examples"]["contaminated"][0].endswith(": gsm8k/0")
    assert report["dropped"]["reference_failed"] == 1 and report["num_references_passed"] == len(rows) - 1
    assert report["examples"]["reference_failed"] == [f"{raw}, row 0: wrong_answer"]
    assert {(row["ability"], row["data_source"]) for row in kept} == {
        ("math", "train"),
        ("math", "test"),
        ("code", "raw"),
    }
    assert [row["extra_info"]["index"] for row in kept] == list(range(len(kept)))
    table = capfd.readouterr().out
    assert "reference failed" in table and "contaminated" in table
    # The same input gives the same bytes; an existing file is not touched.
    assert main([*command[:4], str(tmp_path / "again.parquet"), *command[5:]]) == 0
    assert (tmp_path / "again.parquet").read_bytes() == out.read_bytes()
    assert main(command) == 2 and "exists already" in capfd.readouterr().err


def test_nothing_is_left_behind_by_a_bad_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"problem": "What is 1+1?", "answer": "2"}\n{"text": "?"}\n')
    assert main(["prepare", str(raw), str(tmp_path / "out.jsonl")]) == 2
    assert f"{raw}, row 1: unknown layout" in capfd.readouterr().err
    assert main(["prepare", str(raw), str(tmp_path / "out.jsonl"), "--benchmarks", str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no benchmark" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [raw]
    assert main(["prepare", str(raw), "/proc/out.jsonl"]) == 2
    assert "/proc: no files can be written there (" in capfd.readouterr().err
    for value in ("0", "nan"):
        with pytest.raises(SystemExit):
            main(["prepare", str(raw), str(tmp_path / "out.jsonl"), "--similarity", value])
        assert f"--similarity: {value} is not above 0" in capfd.readouterr().err


def test_rows_are_kept_only_where_right_programs_pass_and_wrong_ones_fail(tmp_path: Path) -> None:
    doubled = [{"fn_name": "double", "input": [[n]], "output": [2 * n], "type": "function_call"} for n in (4, 7)]
    right, wrong = "def double(n):\n    return 2 * n", "def double(n):\n    return n + 1"
    numbered = [
        {"tests": json.dumps(doubled), "solutions": [right]},
        {"tests": json.dumps(doubled), "solutions": [wrong]},
        {"tests": json.dumps(doubled[:1] * 2 + [{**doubled[0], "type": "interactive"}]), "solutions": [right]},
        {"tests": "double(4) == 8", "solutions": [right]},
        {"tests": "def check(candidate):\n    assert candidate(4) == 8", "solutions": [right]},
        {"tests": json.dumps([{"input": "4\n", "output": "0\n", "testtype": "stdin"}])},
        {"tests": json.dumps([{"input": "4\n", "output": "8\n", "testtype": "stdin"}])},
    ]
    questions = ("twice", "two times", "the double of", "the sum with itself of", "what is 2 x", "nothing for", "8 of")
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    rows = [{"problem": f"Give {words} the number.", **row} for words, row in zip(questions, numbered, strict=True)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["prepare", str(raw), str(out)]) == 0
    kept = [row["prompt"][-1]["content"].split(" the number")[0] for _, row in read_rows(str(out))]
    assert kept == ["Give twice", "Give 8 of"]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["dropped"] == {"bad_tests": 4, "reference_failed": 1}
    reasons = [example.partition(": ")[2] for example in report["examples"]["bad_tests"]]
    for reason, part in zip(reasons, ("interactive", "assert nothing", "never call", "print(0)"), strict=True):
        assert part in reason
