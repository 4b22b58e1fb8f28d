"""`megatron-prime verify`: rows in order, malformed ones marked, an interrupted file taken up."""

import json
from pathlib import Path

import pytest

from megatron_prime.commands.main import main
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import DataError
from megatron_prime.verify.offline import verify_file

TESTS = json.dumps({"inputs": ["1", "2"], "outputs": ["2", "3"]})
ROWS = [
    {"response": r"\boxed{4}", "ground_truth": "4", "ability": "math", "data_source": "a", "extra_info": {"i": 1}},
    {"response": r"\boxed{x+1}", "ground_truth": "1+x", "ability": "math"},
    {"response": r"\boxed{z \in [0, 9^{9^{9^9}}]}", "ground_truth": r"1\leq|z|\leq \frac{3}{2}", "ability": "math"},
    {"response": "\ud800", "ground_truth": 4, "ability": "math", "error": "of the input"},
    {"response": "```python\nprint(int(input()) + 1)\n```", "reward_model": {"ground_truth": TESTS}, "ability": "code"},
    {"response": "```python\nprint(2)\n```", "ground_truth": json.loads(TESTS), "ability": "code"},
    {"response": "print(2)", "ground_truth": TESTS, "ability": "code"},
    {"response": "```python\n1\n```", "ground_truth": "{}", "ability": "code"},
    {"response": 5, "ground_truth": "4", "ability": "math"},
    {"response": "x", "ground_truth": "4", "ability": "physics"},
    {"response": "x", "ability": "math"},
]
BROKEN = [b"not json", b"[1]", b"\xff", b"[" * 100_000, b'"text"']
GRADED = ["correct", "correct", "timeout", "no_answer", "pass", "wrong_answer", "no_code", "bad_tests"]
STATUSES = [*GRADED, *["malformed_row"] * 8]
SECTION = VerifierSection(timeout_seconds=1.0, num_workers=2)


@pytest.fixture
def source(tmp_path, fork_server):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n\n".join([*[json.dumps(row).encode() for row in ROWS], *BROKEN]))
    return path


def _grade(source, target):
    return verify_file(source, target, SECTION, lambda done, total: None)


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_gets_a_status_in_its_place(source, tmp_path):
    seen = []
    summary = verify_file(source, tmp_path / "new" / "out.jsonl", SECTION, lambda *counts: seen.append(counts))
    rows = _read(tmp_path / "new" / "out.jsonl")
    assert [row["status"] for row in rows] == STATUSES
    assert [row["reward"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, *[None] * 9]
    for before, after in zip(ROWS, rows, strict=False):
        assert {key: after[key] for key in before if key != "error"} == {
            k: v for k, v in before.items() if k != "error"
        }
    assert all(row["seconds"] >= 0 and row.get("error") for row in rows[8:])
    assert rows[11]["row"] == "not json" and rows[12]["row"] == "[1]"
    assert seen[0] == (0, 16) and seen[-1] == (16, 16)
    assert summary.statuses["malformed_row"] == 8 and len(summary.rewards) == 7
    assert "mean reward 0.4286 of 7 rows" in "\n".join(summary.lines())


def test_an_interrupted_file_is_taken_up(source, tmp_path):
    target = tmp_path / "out.jsonl"
    _grade(source, target)
    content = target.read_bytes()
    lines = content.splitlines(keepends=True)
    # A reward that no grader would give shows which rows are graded again.
    kept = [line.replace(b"1.0", b"0.5") for line in lines[:2]]
    target.write_bytes(b"".join(kept) + lines[2][:20])
    summary = _grade(source, target)
    rows, before = _read(target), [json.loads(line) for line in lines]
    assert [row["reward"] for row in rows] == [0.5, 0.5, *[row["reward"] for row in before[2:]]]
    assert summary.statuses.total() == 16
    assert target.read_bytes().splitlines(keepends=True)[:2] == kept


def test_another_file_is_not_overwritten(source, tmp_path):
    for content in ('{"response": "other", "status": "wrong", "reward": 0.0, "seconds": 0.0}\n', "text\n", "[1]\n"):
        target = tmp_path / "out.jsonl"
        target.write_text(content)
        with pytest.raises(DataError, match=r"out\.jsonl, row 0: is not the verdict"):
            _grade(source, target)
        assert target.read_text() == content
    with pytest.raises(DataError, match="is the input"):
        _grade(source, source)
    with pytest.raises(DataError, match="no such file"):
        _grade(tmp_path / "missing.jsonl", target)


def test_a_target_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path, Path("/proc/out.jsonl"), tmp_path / "file" / "out.jsonl"):
        with pytest.raises(DataError, match=f"{target}: cannot be written .*; name another file for the output"):
            _grade(source, target)
    with pytest.raises(DataError, match="/dev/null: is no regular file"):
        _grade(source, Path("/dev/null"))


def test_the_command(source, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("verifier: {timeout_seconds: 1.0, code: {mode: all_or_nothing}}\nrun: {name: unused}\n")
    target = tmp_path / "out.jsonl"
    arguments = ["verify", str(source), str(target), "verifier.code.mode=fraction_all", "--config", str(config)]
    assert main(arguments) == 0
    assert _read(target)[5]["reward"] == 0.5
    assert "malformed_row" in capsys.readouterr().out
    assert main(["verify", str(source), str(target), "verifier.num_workers=0"]) == 2
    assert "verifier.num_workers: 0 is out of range" in capsys.readouterr().err
    assert main(["verify", str(source), str(target), "rollout.engine=vllm"]) == 2
    assert "only verifier.key=value" in capsys.readouterr().err
