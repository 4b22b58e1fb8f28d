"""An engine of one's own: the example trains, and a broken one is refused before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_models import make_start

from megatron_prime.commands.main import main

ROOT = Path(__file__).resolve().parents[2]


def write_config(root: Path, engine: str) -> Path:
    config = {
        "run": {"name": "run", "directory": str(root), "num_steps": 2, "plots": False},
        "model": {"path": str(make_start("qwen2_tied", root / "start"))},
        "data": {"kind": "arithmetic"},
        "rollout": {"engine": engine, "num_prompts": 3, "num_responses": 2, "max_response_tokens": 6},
        "filter": {"enabled": False},
        "evaluation": {"every_steps": 0, "num_prompts": 0},
        "checkpoint": {"every_steps": 0, "export_hf": False},
    }
    path = root / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def test_the_example_engine_trains_two_steps_and_keeps_every_answer(tmp_path: Path) -> None:
    config = write_config(tmp_path, "own_engine:recording_engine")
    path = os.pathsep.join([str(ROOT / "examples"), str(ROOT)])
    command = [sys.executable, "-m", "megatron_prime", "train", str(config)]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * 2
    assert sorted({row["weight_version"] for row in rows}) == [0, 1]
    assert all(row["mean_logprob"] < 0 and row["prompt"] for row in rows)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "policy/grad_norm" in row] == [1, 2]


def test_check_plans_with_an_engine_that_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    assert main(["check", str(write_config(tmp_path, "own_engine:recording_engine"))]) == 0
    printed = capsys.readouterr().out
    assert "own_engine:recording_engine samples: its memory is not known and counts as none" in printed
    assert "engine weights" not in printed


def test_check_refuses_a_broken_engine_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_an_engine.py").write_text("class Half:\n    def __init__(self, setup): ...\n")
    assert main(["check", str(write_config(tmp_path, "half_an_engine:Half"))]) == 2
    assert "has no generate(prompts, sampling, on_answer)" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "config.yaml"), "rollout.engine=vlm"]) == 2
    assert "did you mean 'vllm'?" in capsys.readouterr().err
