"""Members of a group, here threads of one process, exchange bytes by gloo and learn who is gone or gave up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_prime.rollout.vllm.wire.broadcast import ABORTED_PREFIX, SENDER, Group, TransferAborted

CPU = torch.device("cpu")
PATIENCE_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_group(size: int, action: Callable[[int, Group], Any], *, timeout_seconds: float = 20.0) -> list[Any]:
    """What each member's action returns, or what it raises."""
    port, results = free_port(), [None] * size
    # A store ends with the process of the sender: no member leaves before all are through.
    ended = threading.Barrier(size)

    def run(rank: int) -> None:
        try:
            group = Group("gloo", "127.0.0.1", port, rank, size, timeout_seconds, CPU)
            results[rank] = action(rank, group)
        except RuntimeError as error:
            results[rank] = error
        ended.wait(PATIENCE_SECONDS)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a member hangs"
    return results


def test_everyone_receives_what_the_sender_has_bucket_after_bucket() -> None:
    sent = [torch.arange(10, dtype=torch.uint8), torch.full((3,), 7, dtype=torch.uint8)]

    def exchange(rank: int, group: Group) -> list[list[int]]:
        buckets = [bucket.clone() if rank == SENDER else torch.zeros_like(bucket) for bucket in sent]
        works = [group.begin(bucket) for bucket in buckets]
        for work in works:
            group.wait(work)
        assert group.given_up_by() is None
        return [bucket.tolist() for bucket in buckets]

    assert in_group(3, exchange) == [[bucket.tolist() for bucket in sent]] * 3


@pytest.mark.parametrize(("culprit", "words"), [(SENDER, "the sender gave up"), (1, "rank 1 gave up")])
def test_who_waits_hears_who_gave_up_first(culprit: int, words: str) -> None:
    has_given_up = threading.Event()

    def act(rank: int, group: Group) -> int | None:
        if rank == culprit:
            group.abort()
            has_given_up.set()
        else:
            if rank != 2:
                assert has_given_up.wait(PATIENCE_SECONDS)
                return group.given_up_by()
            try:
                group.wait(group.begin(torch.zeros(4)))
            finally:
                # Too late to be the first.
                group.abort()
        return group.given_up_by()

    results = in_group(3, act)
    assert str(results[2]) == f"{ABORTED_PREFIX}: {words}" and isinstance(results[2], TransferAborted)
    assert [result for rank, result in enumerate(results) if rank != 2] == [culprit, culprit]


def test_a_bucket_that_never_comes_is_waited_for_as_long_as_was_said() -> None:
    def act(rank: int, group: Group) -> None:
        if rank != SENDER:
            group.wait(group.begin(torch.zeros(4)))

    begun = time.monotonic()
    _, error = in_group(2, act, timeout_seconds=1.0)
    assert str(error) == f"{ABORTED_PREFIX}: no bucket for 1 seconds"
    assert time.monotonic() - begun < 30


def test_a_member_that_does_not_come_is_missed() -> None:
    with pytest.raises(TransferAborted, match=r"1 of 2 members came within 0\.2 seconds"):
        Group("gloo", "127.0.0.1", free_port(), SENDER, 2, 0.2, CPU)


def test_a_member_that_is_known_not_to_come_is_not_waited_for() -> None:
    begun = time.monotonic()
    with pytest.raises(TransferAborted, match="the sender gave up"):
        Group("gloo", "127.0.0.1", free_port(), SENDER, 2, 1000.0, CPU, is_cancelled=lambda: True)
    assert time.monotonic() - begun < 30


def test_a_sender_that_is_not_to_be_reached_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        Group("gloo", "127.0.0.1", free_port(), 1, 2, 0.2, CPU)
