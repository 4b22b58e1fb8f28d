"""Tensors cut into buckets and put together again over a channel that is a list; where buckets begin and end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver, BucketSender
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, lay_out, whole_tensors
from megatron_prime.weights.digests import NUM_DIGEST_BYTES, digest

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


class Recorded:
    """A channel whose sender's buckets wait in a list for whoever receives."""

    def __init__(self) -> None:
        self.buckets: list[torch.Tensor] = []
        self.num_awaited = 0
        self._to_read: Iterator[torch.Tensor] | None = None

    def begin(self, data: torch.Tensor) -> torch.Tensor:
        if self._to_read is None:
            self.buckets.append(data.clone())
        else:
            bucket = next(self._to_read)
            assert len(data) == len(bucket), "both ends cut the stream alike"
            data.copy_(bucket)
        return data

    def wait(self, work: torch.Tensor) -> None:
        self.num_awaited += 1

    def rewind(self) -> None:
        self._to_read = iter(self.buckets)


def make_weights(sizes: list[int]) -> Weights:
    generator = torch.Generator().manual_seed(1)
    dtypes = (torch.float32, torch.bfloat16, torch.uint8)
    return {
        f"w{n}": torch.randint(0, 200, (size, 1 + n % 2), generator=generator).to(dtypes[n % 3])
        for n, size in enumerate(sizes)
    }


def plan_of(weights: Weights) -> SharedPlan:
    return whole_tensors(lay_out([(name, tuple(t.shape), t.dtype) for name, t in weights.items()]))


def send(weights: Weights, bucket_bytes: int, *, with_digests: bool = True) -> tuple[Recorded, str]:
    channel = Recorded()
    buckets = torch.empty(2, bucket_bytes, dtype=torch.uint8).unbind()
    sender = BucketSender(plan_of(weights), channel, buckets, with_digests=with_digests)
    checksum = sender.send(iter(weights.items()))
    assert channel.num_awaited == len(channel.buckets)
    channel.rewind()
    return channel, checksum


@given(
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    bucket_bytes=st.sampled_from([64, 128, 192, 1024, 2**16]),
    keeps_all=st.booleans(),
)
def test_any_tensors_arrive_through_buckets_of_any_size(sizes: list[int], bucket_bytes: int, keeps_all: bool) -> None:
    weights = make_weights(sizes)
    channel, checksum = send(weights, bucket_bytes)
    assert all(len(bucket) <= bucket_bytes for bucket in channel.buckets)
    receiver = BucketReceiver(plan_of(weights), channel, bucket_bytes, CPU, keeps_all=keeps_all)
    arrived: Weights = {}
    for batch in receiver:
        # Valid until the next step.
        assert all(torch.equal(tensor, weights[name]) for name, tensor in batch)
        arrived |= dict(batch)
    assert list(arrived) == list(weights)
    if keeps_all:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in arrived.items())
    sums = b"".join(map(digest, weights.values()))
    assert receiver.digests.numpy().tobytes() == sums
    assert checksum == digest(torch.frombuffer(bytearray(sums), dtype=torch.uint8)).hex()


def test_without_digests_zeros_are_sent_in_their_place() -> None:
    weights = make_weights([10, 3])
    channel, _ = send(weights, 64, with_digests=False)
    receiver = BucketReceiver(plan_of(weights), channel, 64, CPU, keeps_all=False)
    assert sum(len(batch) for batch in receiver) == 2
    assert receiver.digests.shape == (2, NUM_DIGEST_BYTES) and receiver.digests.eq(0).all()


def test_strides_do_not_matter_and_a_receiver_has_room_for_two_buckets() -> None:
    wide = torch.arange(600, dtype=torch.float32).view(20, 30)
    weights = {"turned": wide.T, "every other": wide[::2]}
    channel, _ = send(weights, 256)
    receiver = BucketReceiver(plan_of(weights), channel, 256, CPU, keeps_all=False)
    assert receiver._memory.numel() == 512
    assert all(torch.equal(tensor, weights[name]) for batch in receiver for name, tensor in batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"w1": torch.zeros(3, 1), "w0": torch.zeros(10, 1)},
        {"w0": torch.zeros(10, 2), "w1": torch.zeros(3, 2)},
        {"w0": torch.zeros(10, 1)},
    ],
    ids=["another order", "another shape", "one is missing"],
)
def test_what_is_not_planned_is_not_sent(wrong: Weights) -> None:
    planned = make_weights([10, 3])
    buckets = torch.empty(2, 64, dtype=torch.uint8).unbind()
    sender = BucketSender(plan_of(planned), Recorded(), buckets, with_digests=True)
    with pytest.raises((AssertionError, ValueError)):
        sender.send(iter(wrong.items()))
