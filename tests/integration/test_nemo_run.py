"""Recipes as NeMo-Run tasks: what would be submitted, and the example's three dependent tasks for real."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from nemo_experiment import PYTHON, REASON, check_results, experiment, nemo_run

from megatron_prime.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "arithmetic_sft.yaml")
needs_nemo_run = pytest.mark.skipif(not PYTHON.exists(), reason=REASON)


@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is not None, reason="the environment has NeMo-Run itself")
def test_without_nemo_run_there_is_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "nemo-run", CONFIG, "--dry-run"]) == 2
    assert "make setup-nemo-run" in capsys.readouterr().err


@needs_nemo_run
def test_dry_run_prints_the_job(tmp_path: Path) -> None:
    options = ("--tasks-per-node=2", "--time=2:00:00", "--partition=gpu", "--dry-run")
    result = nemo_run(tmp_path, "-m", "megatron_prime", "launch", "nemo-run", CONFIG, *options)
    assert result.returncode == 0, result.stderr
    for line in ("#SBATCH --nodes=1", "#SBATCH --partition=gpu", "#SBATCH --time=2:00:00", "#SBATCH --signal=TERM@300"):
        assert line in result.stdout
    assert "--nproc-per-node 2" in result.stdout


@needs_nemo_run
def test_three_tasks_run_here_one_after_the_other(tmp_path: Path) -> None:
    result = experiment(tmp_path, "local")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    check_results(tmp_path)
