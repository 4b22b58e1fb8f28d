"""What ranks see of each other; ranks that hang or compute for real are in tests/integration/test_faults.py."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prime.watch import watchdog as watchdog_module
from megatron_prime.watch.watchdog import Watchdog


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
