"""Ranks that hang are named and end the job; those that compute, or wait for an engine that makes progress, do not."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prime.watch import watchdog as watchdog_module
from megatron_prime.watch.exit_status import STALLED
from megatron_prime.watch.watchdog import Watchdog

TIMEOUT_SECONDS = 1.0
RANK = """
import sys, threading, time
from pathlib import Path
from megatron_prime import heartbeat
from megatron_prime.watch.watchdog import Watchdog

folder, rank, world_size, behaviour = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
# A function of a module by whose name the watchdog knows that other ranks are waited for.
collective = {"__name__": "torch.distributed.distributed_c10d", "time": time}
exec("def all_reduce(seconds):\\n    time.sleep(seconds)", collective)

def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))

def beat_for(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        heartbeat.beat()
        time.sleep(0.05)

watchdog = Watchdog(folder, rank=rank, world_size=world_size, timeout_seconds=float(sys.argv[5]))
with watchdog.watching():
    if behaviour == "waits":
        watchdog.enter("score", 3)
        collective["all_reduce"](60)
    elif behaviour == "waits for a rollout":
        watchdog.enter("rollout", 3)
        collective["all_reduce"](4)
    elif behaviour == "hangs":
        watchdog.enter("score", 3)
        time.sleep(60)
    elif behaviour == "computes":
        watchdog.enter("score", 3)
        compute(4)
    elif behaviour == "samples":
        watchdog.enter("rollout", 3)
        threading.Thread(target=beat_for, args=(4,), daemon=True).start()
        time.sleep(3.9)
    elif behaviour == "waits for a dead engine":
        watchdog.enter("rollout", 3)
        collective["all_reduce"](60)
"""


def run(folder: Path, *behaviours: str) -> list[tuple[int, str]]:
    """Exit status and standard error of ranks that do these things; one that is left is ended."""
    command = [sys.executable, "-c", RANK, str(folder)]
    size = str(len(behaviours))
    ranks = [
        subprocess.Popen(
            [*command, str(rank), size, behaviour, str(TIMEOUT_SECONDS)], stderr=subprocess.PIPE, text=True
        )
        for rank, behaviour in enumerate(behaviours)
    ]
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def test_a_rank_that_hangs_is_named_with_its_stack_and_all_end(tmp_path: Path) -> None:
    found = run(tmp_path, "waits", "hangs")
    assert [status for status, _ in found] == [STALLED, STALLED]
    # One of them reports for both.
    (report,) = [error for _, error in found if error]
    assert report == (tmp_path / "stall_report.txt").read_text()
    assert "rank 1" in report.splitlines()[0] and "phase score of step 3" in report
    assert "time.sleep" not in report.splitlines()[0]
    assert 'File "<string>"' in report, "the stack of who hangs"


def test_a_rank_that_computes_is_no_rank_that_hangs(tmp_path: Path) -> None:
    assert run(tmp_path, "computes") == [(0, "")]
    assert not (tmp_path / "stall_report.txt").exists()


def test_who_samples_is_waited_for_as_long_as_its_engine_makes_progress(tmp_path: Path) -> None:
    assert run(tmp_path, "waits for a rollout", "samples") == [(0, ""), (0, "")]


def test_a_collective_that_nobody_comes_to_is_not_waited_for_without_end(tmp_path: Path) -> None:
    ((status, report),) = run(tmp_path, "waits for a dead engine")
    assert status == STALLED and "all_reduce" in report


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Watchdog, Watchdog]]:
    """Two ranks' watchdogs, which do not watch yet."""
    made = tuple(Watchdog(tmp_path, rank=rank, world_size=2, timeout_seconds=100.0) for rank in range(2))
    yield made  # pyright: ignore[reportReturnType]
    for watchdog in made:
        watchdog._file.close()


def test_ranks_see_where_the_others_are(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    second.enter("policy_update", 4)
    assert first.place() == "phase start"
    assert {rank: status.place() for rank, status in first.peers().items()} == {1: "phase policy_update of step 4"}
    assert list(second.peers()) == [0]


def test_a_rank_that_says_that_it_fails_is_heard_at_once(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    threading.Timer(0.3, second.fail, args=("out of memory",)).start()
    begun = time.monotonic()
    failed, silent = first.wait_for_failure(30.0)
    assert [status.failure for status in failed] == ["out of memory"] and silent == []
    assert time.monotonic() - begun < 20


def test_a_rank_whose_watchdog_stands_still_is_told_from_one_that_waits(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    failed, silent = first.wait_for_failure(0.3)
    assert failed == [] and [status.rank for status in silent] == [1]
    second._check_seconds = 0.05
    with contextlib.ExitStack() as stack:
        stack.enter_context(second.watching())
        assert first.wait_for_failure(1.0) == ([], [])
    # For the fixture, which closes it again.
    second._file = first._file.__class__(first._folder, 1)


def test_memory_that_is_nearly_used_up_is_said_once(pair, monkeypatch, caplog) -> None:
    watchdog = pair[0]
    watchdog.enter("policy_update", 2)
    free = iter([10.0, 0.1, 0.1, 10.0, 0.1])
    monkeypatch.setattr(watchdog_module, "host_memory_gib", lambda: (next(free), 16.0))
    for _ in range(5):
        watchdog._watch_memory()
    assert [record.getMessage().count("0.10 GiB of its 16.0 GiB") for record in caplog.records] == [1, 1]
    assert "phase policy_update of step 2" in caplog.text
