"""A set of weights sent over gloo is what was sent, wherever buckets begin and end."""

from __future__ import annotations

import os
import time

import pytest
import torch
from gloo_processes import free_port

from megatron_prime.rollout.vllm.wire.broadcast import ABORTED_PREFIX, Group, TransferAborted
from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver, BucketSender
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, lay_out, whole_tensors
from megatron_prime.weights.digests import digest

CPU = torch.device("cpu")
SHAPES = {"one": (3,), "aligned": (16, 4), "long": (1000,), "tiny": (1,), "matrix": (37, 5), "last": (64,)}


def make_weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16 if name == "matrix" else torch.float32)
        for name, shape in SHAPES.items()
    }


def plan_of(weights: dict[str, torch.Tensor]) -> SharedPlan:
    return whole_tensors(lay_out([(name, tuple(t.shape), t.dtype) for name, t in weights.items()]))


def exchange(port: int, bucket_bytes: int, keeps_all: bool) -> list[list[bool]]:
    """Per set of weights, which tensors arrived as they were sent, in the order in which they were complete."""
    rank = int(os.environ["RANK"])
    plan = plan_of(make_weights(0))
    group = Group("gloo", "127.0.0.1", port, rank, 3, 60.0, CPU)
    if rank == 0:
        sender = BucketSender(plan, group, torch.empty(2, bucket_bytes, dtype=torch.uint8).unbind(), with_digests=True)
        for version in range(3):
            sent = make_weights(version)
            sums = torch.frombuffer(bytearray(b"".join(map(digest, sent.values()))), dtype=torch.uint8)
            assert sender.send(iter(sent.items())) == digest(sums).hex()
        return []
    receiver = BucketReceiver(plan, group, bucket_bytes, CPU, keeps_all=keeps_all)
    arrived = []
    for version in range(3):
        expected = make_weights(version)
        kept = {}
        arrived.append([])
        for batch in receiver:
            arrived[-1] += [torch.equal(tensor, expected[name]) for name, tensor in batch]
            kept.update(batch)
        assert list(kept) == list(expected)
        assert not keeps_all or all(torch.equal(kept[name], tensor) for name, tensor in expected.items())
        arrived[-1].append(receiver.digests.numpy().tobytes() == b"".join(map(digest, expected.values())))
    return arrived


@pytest.mark.parametrize("keeps_all", [True, False], ids=["whole", "windows"])
@pytest.mark.parametrize("bucket_bytes", [64, 256, 4096, 2**20])
def test_every_receiver_gets_every_set(gloo_pool, bucket_bytes: int, keeps_all: bool) -> None:
    _, *receivers = gloo_pool.run(3, exchange, free_port(), bucket_bytes, keeps_all)
    assert receivers == [[[True] * (len(SHAPES) + 1)] * 3] * 2


def give_up(port: int) -> str:
    rank = int(os.environ["RANK"])
    group = Group("gloo", "127.0.0.1", port, rank, 2, 60.0, CPU)
    if rank == 0:
        group.abort()
        group._store.wait(["done"])  # leaving would close the connection, which receivers see too
        return ""
    message = "received something"
    try:
        group.wait(group.begin(torch.zeros(4)))
    except RuntimeError as error:
        message = str(error)
    group._store.set("done", "1")
    return message


def fail_alone(port: int) -> tuple[str, int | None]:
    rank = int(os.environ["RANK"])
    group = Group("gloo", "127.0.0.1", port, rank, 3, 60.0, CPU)
    message, others = "", ["done 1", "done 2"]
    if rank == 1:
        group.abort()
    elif rank == 2:
        with pytest.raises(TransferAborted) as found:
            group.wait(group.begin(torch.zeros(4)))
        message = str(found.value)
        group.abort()
    else:
        # The store is this process's.
        group._store.wait(others)
    culprit = group.given_up_by()
    if rank == 1:
        group._store.wait(["done 2"])  # as in `give_up`
    if rank > 0:
        group._store.set(f"done {rank}", "1")
    return message, culprit


def test_everyone_knows_who_gave_up_first(gloo_pool) -> None:
    sender, _, other = gloo_pool.run(3, fail_alone, free_port())
    assert sender == ("", 1)
    assert other == (f"{ABORTED_PREFIX}: rank 1 gave up", 1)


def test_a_sender_that_gives_up_is_not_waited_for(gloo_pool) -> None:
    assert gloo_pool.run(2, give_up, free_port())[1].endswith("the sender gave up")


def wait_for_absent(port: int, timeout_seconds: float, is_known: bool) -> tuple[str, float]:
    """What members say of a group of three in which the third never comes, and after how long."""
    rank = int(os.environ["RANK"])
    begun = time.monotonic()
    with pytest.raises(TransferAborted) as found:
        Group("gloo", "127.0.0.1", port, rank, 3, timeout_seconds, CPU, lambda: rank == 0 and is_known)
    return str(found.value), time.monotonic() - begun


@pytest.mark.parametrize(("timeout_seconds", "is_known"), [(1.0, False), (1000.0, True)])
def test_who_does_not_come_is_not_waited_for_without_end(gloo_pool, timeout_seconds: float, is_known: bool) -> None:
    (sender, seconds), (_, others) = gloo_pool.run(2, wait_for_absent, free_port(), timeout_seconds, is_known)
    expected = "the sender gave up" if is_known else "2 of 3 members came within 1 seconds"
    assert sender == f"{ABORTED_PREFIX}: {expected}"
    assert max(seconds, others) < 60
