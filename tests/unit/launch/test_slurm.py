"""What a job would run, and jobs that cannot be."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_prime.assets import ASSETS
from megatron_prime.commands.main import main

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "configs" / "prime_qwen2.5_32b.yaml")


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_slurm_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus-per-node=8", "--time=4:00:00", "--partition=gpu", "--container=prime.sqsh", "--sbatch=--mem=0"]
    words = shlex.split(dry_run(capsys, "slurm", RECIPE, "run.seed=3", *options))
    script = words.index(str(ASSETS / "launch_prime.sbatch"))
    assert words[0] == "sbatch"
    assert {
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--exclusive",
        "--time=4:00:00",
        "--partition=gpu",
        "--mem=0",
        "--signal=B:USR1@300",
        "--job-name=prime_qwen2.5_32b",
    } <= set(words[:script])
    assert words[script + 1 :] == ["--container", "prime.sqsh", "--", "train", RECIPE, "run.seed=3"]


def test_servers_are_a_second_component(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus-per-node=8", "--time=4:00:00", "--partition=gpu", "--server-nodes=2", "--sbatch=--mem=0"]
    words = shlex.split(dry_run(capsys, "slurm", RECIPE, "rollout.vllm.tensor_parallel_size=4", *options))
    colon, script = words.index(":"), words.index(str(ASSETS / "launch_prime.sbatch"))
    shared = {"--gpus-per-node=8", "--exclusive", "--time=4:00:00", "--partition=gpu", "--mem=0"}
    assert {"--nodes=4", "--ntasks-per-node=8", "--signal=B:USR1@300", *shared} <= set(words[:colon])
    assert {"--nodes=2", "--ntasks-per-node=2", *shared} == set(words[colon + 1 : script])
    assert words[script + 1 :] == ["--", "train", RECIPE, "rollout.vllm.tensor_parallel_size=4"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            [RECIPE, "rollout.vllm.tensor_parallel_size=3", "--gpus-per-node=8"],
            "servers of 3 GPUs do not fill nodes of 8",
        ),
        ([RECIPE, "--seeds=1,2"], "Slurm has no arrays of heterogeneous jobs"),
    ],
)
def test_servers_that_cannot_be(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    assert main(["launch", "slurm", *arguments, "--server-nodes=1", "--dry-run"]) == 2
    assert problem in capsys.readouterr().err


def test_ranks_must_fill_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", RECIPE, "--tasks-per-node=5", "--dry-run"]) == 2
    assert "--tasks-per-node: 32 ranks do not fill nodes of 5" in capsys.readouterr().err
