"""Recipes as NeMo-Run tasks: what would be submitted, and a run through torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prime.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "arithmetic_sft.yaml")
HAS_NEMO_RUN = importlib.util.find_spec("nemo_run") is not None
needs_nemo_run = pytest.mark.skipif(not HAS_NEMO_RUN, reason="NeMo-Run is not installed (pip install .[launch])")


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # torchrun is found by name; a wide terminal keeps long lines of the dry run whole.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"NEMORUN_HOME": str(folder / "nemo"), "PATH": path, "COLUMNS": "400"}
    command = [sys.executable, "-m", "megatron_prime.cli", "launch", "nemo-run", CONFIG, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.skipif(HAS_NEMO_RUN, reason="NeMo-Run is installed")
def test_without_nemo_run_there_is_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "nemo-run", CONFIG, "--dry-run"]) == 2
    assert "pip install 'megatron-prime[launch]'" in capsys.readouterr().err


@needs_nemo_run
def test_dry_run_prints_the_job(tmp_path: Path) -> None:
    result = launch(tmp_path, "--tasks-per-node=2", "--time=2:00:00", "--partition=gpu", "--dry-run")
    assert result.returncode == 0, result.stderr
    for line in ("#SBATCH --nodes=1", "#SBATCH --partition=gpu", "#SBATCH --time=2:00:00", "#SBATCH --signal=TERM@300"):
        assert line in result.stdout
    assert "--nproc-per-node 2" in result.stdout


@needs_nemo_run
def test_a_task_trains_under_torchrun(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}", "run.name=r", "run.num_steps=60", "checkpoint.export_hf=false"]
    result = launch(tmp_path, *overrides, "--executor=local")
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["num_steps"] == 60
