"""A run that is killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
from small_task import prime_config, read_curve, write_yaml

COMMAND = [sys.executable, "-m", "megatron_prime.cli"]
PARALLEL = {"world_size": 2, "tensor_model_parallel_size": 2}
NUM_STEPS = 7


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("start")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'distributed')!r}); "
    code += f"from small_task import make_start; make_start({str(root)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    return str(root / "sft" / "hf")


def config_of(start: str, directory: Path, name: str) -> Path:
    config = prime_config(
        start,
        str(directory),
        name,
        run={"name": name, "directory": str(directory), "num_steps": NUM_STEPS, "seed": 3},
        parallel=PARALLEL,
        advantage={"process_gate": "auc"},
        # More groups than a batch takes, so that the filter's buffer has to survive too.
        filter={"max_attempts": 3, "min_accuracy": 0.1, "max_accuracy": 0.9},
        rollout={"num_prompts": 8, "num_responses": 4, "max_response_tokens": 32},
        checkpoint={"every_steps": 2, "keep_last": 2},
        evaluation={"every_steps": 3, "num_prompts": 20},
    )
    return write_yaml(directory / f"{name}.yaml", config)


def num_rows(directory: Path, name: str) -> int:
    path = directory / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_after(config: Path, directory: Path, name: str, step: int) -> None:
    """Starts a run and kills its launcher, and with it all ranks, once a step is logged."""
    process = subprocess.Popen([*COMMAND, "train", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while num_rows(directory, name) <= step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_kill_and_resume_is_bit_exact(start: str, tmp_path: Path) -> None:
    whole = config_of(start, tmp_path, "whole")
    subprocess.run([*COMMAND, "train", str(whole)], check=True, capture_output=True, timeout=250)

    broken = config_of(start, tmp_path, "broken")
    kill_after(broken, tmp_path, "broken", step=3)
    kill_after(broken, tmp_path, "broken", step=5)
    result = subprocess.run([*COMMAND, "train", str(broken)], check=True, capture_output=True, text=True, timeout=250)
    assert "resumed after step 4" in result.stderr

    expected, actual = read_curve(str(tmp_path), "whole"), read_curve(str(tmp_path), "broken")
    assert len(expected) == 1 + NUM_STEPS
    assert actual == expected
    for folder in ("hf", "hf_prm"):
        weights = [load_file(tmp_path / name / folder / "model.safetensors") for name in ("whole", "broken")]
        assert weights[0].keys() == weights[1].keys()
        assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])

    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken")]
    for summary in summaries:
        summary.pop("wall_seconds")
    assert summaries[0] == summaries[1]

    kept = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000007"]

    refused = subprocess.run(
        [*COMMAND, "train", str(whole), "run.resume=never"], capture_output=True, text=True, timeout=100
    )
    assert refused.returncode == 2
    assert "run.resume: never" in refused.stderr

    other = subprocess.run(
        [*COMMAND, "train", str(whole), "parallel.tensor_model_parallel_size=1"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert other.returncode == 2
    assert "parallel.tensor_model_parallel_size: 1, but the run" in other.stderr
