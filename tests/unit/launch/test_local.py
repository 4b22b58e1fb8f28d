"""Ranks of a local run: who ends whom, and what is said of one that ended without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prime.launch.local import _wait, is_launched, is_main_rank, launch_local
from megatron_prime.launch.newest_step import newest_step
from megatron_prime.watch.exit_status import EXPLAINED, INTERRUPTED, PEER_LOST

ROOT = Path(__file__).resolve().parents[3]


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


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Launches a shell script in the place of every rank, which finds its number in RANK."""

    def launch(script: str, world_size: int = 2, ranks_folder: Path | None = None) -> int:
        interpreter = tmp_path / "rank.sh"
        interpreter.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        interpreter.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(interpreter))
        return launch_local(["train", "my.yaml"], world_size, 3, ranks_folder)

    return launch


def test_ranks_get_the_command_and_what_torch_asks_for(ranks, tmp_path: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    values = " ".join(f"${name}" for name in names)
    assert ranks(f'echo "$@" {values} > out_$RANK; echo $MASTER_PORT > port_$RANK') == 0
    for rank in range(2):
        assert (tmp_path / f"out_{rank}").read_text().split() == (
            f"-m megatron_prime train my.yaml {rank} 2 {rank} 2 127.0.0.1 3".split()
        )
    first, second = ((tmp_path / f"port_{rank}").read_text() for rank in range(2))
    assert first == second and int(first) > 0


def test_the_first_rank_to_fail_takes_the_others_down(ranks, tmp_path: Path, capfd) -> None:
    status = ranks("echo $$ > pid_$RANK; if [ $RANK = 1 ]; then sleep 0.3; exit 5; else exec sleep 1000; fi")
    assert status == 5
    assert capfd.readouterr().err == "rank 1 ended with status 5\n"
    assert not Path(f"/proc/{(tmp_path / 'pid_0').read_text().strip()}").exists()


def test_a_rank_that_was_killed_is_named_with_what_it_did(ranks, tmp_path: Path, capfd) -> None:
    folder = tmp_path / "ranks"
    code = (
        "import os, sys; from pathlib import Path; from megatron_prime.watch.rank_status import *; "
        "StatusFile(Path(sys.argv[1]), 1).write(RankStatus(rank=1, host='h', pid=int(sys.argv[2]), phase='rollout', "
        "step=7, phase_seconds=0.0, num_checks=1))"
    )
    write = f'{sys.executable} -c "{code}" {folder} $$'
    assert ranks(f"[ $RANK = 0 ] && exec sleep 1000; {write}; kill -KILL $$", ranks_folder=folder) == 128 + 9
    error = capfd.readouterr().err
    assert error == (
        "rank 1 was killed by SIGKILL (often by the kernel, for want of memory) in phase rollout of step 7\n"
    )


@pytest.mark.parametrize("status", sorted(EXPLAINED))
def test_a_rank_that_has_said_why_is_not_spoken_for(ranks, capfd, status: int) -> None:
    assert ranks(f"exit {status}", world_size=1) == status
    assert capfd.readouterr().err == ""


def test_of_ranks_that_end_together_one_that_lost_another_is_not_the_reason() -> None:
    ended = [subprocess.Popen(["sh", "-c", f"exit {status}"]) for status in (PEER_LOST, 0, 5)]
    for process in ended:
        process.wait()
    assert _wait(ended) == (2, 5)
    assert _wait(ended[:2]) == (0, PEER_LOST)


def test_ranks_that_have_saved_may_end_by_themselves(ranks, tmp_path: Path) -> None:
    script = f"if [ $RANK = 0 ]; then exit {INTERRUPTED}; fi; sleep 0.5; touch saved; exit {INTERRUPTED}"
    assert ranks(script) == INTERRUPTED
    assert (tmp_path / "saved").exists()


def test_a_process_knows_whether_it_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_launched() and is_main_rank()
    monkeypatch.setenv("RANK", "1")
    assert not is_launched() and not is_main_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_launched()
