"""What a launcher would run, which nodes it refuses, and how a run is asked to stop."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_prime.assets import ASSETS
from megatron_prime.commands.main import main
from megatron_prime.launch import health
from megatron_prime.launch.newest_step import newest_step
from megatron_prime.watch.exit_status import INTERRUPTED
from megatron_prime.watch.interrupt import stop_requests

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


def node_problems(folder: Path, **changes: float) -> list[str]:
    limits = {"min_gpus": 0, "min_disk_gib": 0.001, "min_shm_mib": 1.0, "started": time.time()}
    return health.problems_of_node(folder=folder, **(limits | changes))  # type: ignore[arg-type]


def test_a_sound_node_has_no_problems(tmp_path: Path) -> None:
    assert node_problems(tmp_path / "new") == []
    assert list((tmp_path / "new").iterdir()) == []


def test_every_check_of_a_node_can_fail(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in node_problems(file / "below")[0]
    assert "GiB free of the" in node_problems(tmp_path, min_disk_gib=1e9)[0]
    assert "/dev/shm has" in node_problems(tmp_path, min_shm_mib=1e12)[0]
    assert "the clock is +900 s" in node_problems(tmp_path, started=time.time() - 900)[0]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, 0'\necho '1, 7'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert node_problems(tmp_path, min_gpus=2) == ["GPUs 1 have uncorrected memory errors; reset or replace them"]
    assert "2 of 4 GPUs answer" in node_problems(tmp_path, min_gpus=4)[0]


def test_the_check_prints_one_line_per_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["--folder", str(tmp_path), "--min-disk-gib", "0.001", "--min-shm-mib", "1"]) == 0
    assert capsys.readouterr().out.startswith("ok ")
    assert health.main(["--folder", str(tmp_path), "--min-disk-gib", "1e9", "--min-shm-mib", "1e12"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bad", "bad"]


def test_progress_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}", "run.name=r"]
    config = str(ROOT / "configs" / "arithmetic.yaml")
    assert newest_step(config, overrides) == -1
    for name in ("step_00000010", "step_00000020", "step_00000030.writing", "step_00000040.damaged"):
        (tmp_path / "r" / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(config, overrides) == 20


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_an_answer_and_not_an_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
    assert signal.getsignal(number) == before


def test_only_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as should_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def begin_run(directory: Path, num_ranks: int, *more: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A long supervised run in its first steps, in a process group of its own as a terminal starts it."""
    command = [
        sys.executable,
        "-m",
        "megatron_prime",
        "sft",
        str(ROOT / "configs" / "arithmetic_sft.yaml"),
    ]
    overrides = [f"run.directory={directory}", "run.name=r", "run.num_steps=200000", "sft.log_every_steps=1"]
    others = [f"model.path={ROOT / 'configs' / 'models' / 'arithmetic'}", f"parallel.world_size={num_ranks}"]
    process = subprocess.Popen(
        [*command, *others, *more, *overrides], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, deadline = directory / "r" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    return process, overrides


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_local_run_saves_when_told_to_stop(tmp_path: Path, num_ranks: int, number: signal.Signals) -> None:
    process, overrides = begin_run(tmp_path, num_ranks)
    # A terminal's Ctrl-C reaches all processes, another signal only the one that it is sent to.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == INTERRUPTED
    assert "stopped as asked and saved after step" in error and "the same command goes on from there" in error
    assert error.count("Ctrl-C again") == (number == signal.SIGINT)
    assert newest_step(str(ROOT / "configs" / "arithmetic_sft.yaml"), overrides) >= 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_local_run_ends_at_once_when_told_twice(tmp_path: Path, num_ranks: int) -> None:
    # A step takes seconds.
    process, _ = begin_run(tmp_path, num_ranks, "sft.batch_size=512")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in error and "was killed" not in error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_launcher_in_a_thread_needs_no_signals() -> None:
    statuses: list[bool] = []

    def ask() -> None:
        with stop_requests() as should_stop:
            statuses.append(should_stop())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert statuses == [False]
