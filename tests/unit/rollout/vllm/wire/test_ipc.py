"""Buckets in memory that processes share: readers get every set, and who is lost is not waited for."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver, BucketSender
from megatron_prime.rollout.vllm.wire.ipc import BucketReader, SharedBuckets
from megatron_prime.rollout.vllm.wire.shared_memory import lay_out, whole_tensors
from megatron_prime.weights.digests import digest

CPU = torch.device("cpu")
SHAPES = {"one": (3,), "empty": (0, 4), "long": (1000,), "matrix": (37, 5), "last": (64,)}
PLAN = whole_tensors(
    lay_out([(name, s, torch.bfloat16 if name == "matrix" else torch.float32) for name, s in SHAPES.items()])
)
READER = """
import pickle, sys, torch
from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver
from megatron_prime.rollout.vllm.wire.ipc import BucketReader
offer, plan, reader, firsts = pickle.load(sys.stdin.buffer)
end = BucketReader(offer, reader, 20.0)
receiver = BucketReceiver(plan, end, offer.bucket_bytes, torch.device("cpu"), keeps_all=False)
for first in firsts:
    end.start(first)
    tensors = {name: tensor.clone() for batch in receiver for name, tensor in batch}
    pickle.dump((tensors, receiver.digests.clone()), sys.stdout.buffer)
"""


def make_weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16 if name == "matrix" else torch.float32)
        for name, shape in SHAPES.items()
    }


def send(channel: SharedBuckets, version: int) -> str:
    sender = BucketSender(PLAN, channel, channel.buckets, with_digests=True)
    return sender.send(iter(make_weights(version).items()))


def is_what_was_sent(version: int, tensors: dict[str, torch.Tensor], digests: torch.Tensor) -> bool:
    expected = make_weights(version)
    same = [torch.equal(tensors[name], tensor) for name, tensor in expected.items()]
    return all(same) and digests.numpy().tobytes() == b"".join(map(digest, expected.values()))


def test_two_processes_read_three_sets() -> None:
    channel = SharedBuckets(192, 2, CPU, 20.0, lambda: False)
    num_buckets = -(-(PLAN.entries[-1].end + 16 * len(SHAPES)) // 192)
    firsts = [0, num_buckets, 2 * num_buckets]
    readers = []
    for reader in range(2):
        process = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        pickle.dump((channel.offer, PLAN, reader, firsts), process.stdin)
        process.stdin.close()
        readers.append(process)
    sums = [send(channel, version) for version in range(3)]
    assert len(set(sums)) == 3
    assert channel.num_filled == 3 * num_buckets
    for process in readers:
        for version in range(3):
            assert is_what_was_sent(version, *pickle.load(process.stdout))
        assert process.wait() == 0


def test_a_reader_that_stopped_halfway_leaves_nothing_to_its_successor() -> None:
    lost = threading.Event()
    channel = SharedBuckets(256, 1, CPU, 20.0, lost.is_set)

    def read_two_buckets() -> None:
        reader = BucketReader(channel.offer, 0, 20.0)
        for _ in range(2):
            reader.wait(reader.begin(torch.empty(256, dtype=torch.uint8)))
        lost.set()

    thread = threading.Thread(target=read_two_buckets)
    thread.start()
    with pytest.raises(RolloutError, match="the engine reads no more"):
        send(channel, 0)
    thread.join()
    lost.clear()
    found = {}

    def read_all(first: int) -> None:
        reader = BucketReader(channel.offer, 0, 20.0)
        reader.start(first)
        receiver = BucketReceiver(PLAN, reader, 256, CPU, keeps_all=True)
        found.update(item for batch in receiver for item in batch)
        found["digests"] = receiver.digests

    thread = threading.Thread(target=read_all, args=(channel.num_filled,))
    thread.start()
    send(channel, 1)
    thread.join()
    assert is_what_was_sent(1, found, found["digests"])


def test_silence_has_an_end_on_both_sides() -> None:
    channel = SharedBuckets(256, 1, CPU, 0.05, lambda: False)
    with pytest.raises(RolloutError, match=r"the engine has not read on for 0.05 seconds"):
        send(channel, 0)
    reader = BucketReader(channel.offer, 0, 0.05)
    reader.start(channel.num_filled)
    with pytest.raises(RolloutError, match=r"the trainer has sent nothing for 0.05 seconds"):
        reader.wait(reader.begin(torch.empty(256, dtype=torch.uint8)))


def test_a_trainer_that_is_gone_is_an_error() -> None:
    channel = SharedBuckets(256, 1, CPU, 0.05, lambda: False)
    channel.close()
    with pytest.raises(RolloutError, match=r"shared memory of \d+ bytes for the weights"):
        BucketReader(channel.offer, 0, 0.05)


def test_a_gpu_that_the_engine_does_not_see_is_named() -> None:
    channel = SharedBuckets(256, 1, CPU, 0.05, lambda: False)
    offer = replace(channel.offer, cuda_handle=(None,) * 15, gpu="GPU-1")
    with pytest.raises(ValueError, match=r"GPU-1 is not among .* use rollout.vllm.transfer=shared_memory"):
        BucketReader(offer, 0, 0.05)
