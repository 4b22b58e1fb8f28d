"""Options of a job, dry runs, and what is said without Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prime.commands.main import main

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "configs" / "prime_qwen2.5_32b.yaml")


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--tasks-per-node=0", "0 is not 1 or more"),
        ("--tasks-per-node=-2", "-2 is not 1 or more"),
        ("--gpus-per-node=-1", "-1 is not 0 or more"),
        ("--save-seconds=-5", "-5 is not 1 or more"),
        ("--save-seconds=soon", "'soon' is no whole number"),
        ("--server-nodes=-1", "-1 is not 0 or more"),
        ("--seeds=1,x", "'x' is no whole number"),
        ("--seeds=1,-2", "-2 is not 0 or more"),
        ("--seeds=1,2,1", "1,2,1 names a number twice"),
    ],
)
def test_numbers_of_a_job_have_ranges(capsys: pytest.CaptureFixture[str], option: str, problem: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", "slurm", RECIPE, option, "--dry-run"])
    assert ended.value.code == 2
    assert f"argument {option.split('=')[0]}: {problem}" in capsys.readouterr().err


def test_the_local_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, "local", str(ROOT / "configs" / "arithmetic_sft.yaml"), "run.seed=2").splitlines()
    assert len(lines) == 2
    assert all(line.endswith("arithmetic_sft.yaml run.seed=2") and "megatron-prime sft" in line for line in lines)
    assert lines[1].startswith("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 ")


def test_without_slurm_there_is_a_reason(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "status", "1"]) == 2
    assert "scontrol: not found; run this on a machine of the cluster" in capsys.readouterr().err
