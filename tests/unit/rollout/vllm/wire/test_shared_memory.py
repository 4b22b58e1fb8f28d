"""Shared memory between processes: what one writes the other reads, and the kernel cleans up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, lay_out

TENSORS = [("a", (3, 5), torch.float32), ("b", (7,), torch.bfloat16), ("none", (0, 4), torch.float32)]
PLAN = SharedPlan(lay_out(TENSORS), (("a", ((0, 3), (0, 5))), ("b", ((0, 7),))), num_writers=2)


def test_places_are_aligned_and_apart() -> None:
    entries = lay_out(TENSORS)
    assert [e.offset for e in entries] == [0, 64, 128]
    assert [e.num_bytes for e in entries] == [60, 14, 0]


def test_another_process_reads_what_this_one_writes() -> None:
    memory = SharedWeights(PLAN)
    memory.tensors["a"].copy_(torch.arange(15.0).view(3, 5))
    memory.tensors["b"].fill_(2.5)
    memory.digests.fill_(1)
    memory.progress.fill_(3)
    code = (
        "import sys, torch\n"
        "from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, lay_out\n"
        "tensors = [('a', (3, 5), torch.float32), ('b', (7,), torch.bfloat16), ('none', (0, 4), torch.float32)]\n"
        "slices = (('a', ((0, 3), (0, 5))), ('b', ((0, 7),)))\n"
        "memory = SharedWeights(SharedPlan(lay_out(tensors), slices, 2), sys.argv[1], writable=False)\n"
        "memory.wait(3, 5.0)\n"
        "print(float(memory.tensors['a'].sum()), float(memory.tensors['b'].sum()), int(memory.digests.sum()))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code, memory.path], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["105.0", "17.5", "32"]


def test_two_writers_share_one_memory() -> None:
    memory = SharedWeights(PLAN)
    other = SharedWeights(PLAN, memory.path)
    other.tensors["a"][1].fill_(9)
    assert memory.tensors["a"].sum() == 45


def test_closing_frees_the_descriptor_and_a_lost_memory_is_an_error() -> None:
    memory = SharedWeights(PLAN)
    assert os.path.exists(memory.path)
    memory.close()
    assert not os.path.exists(memory.path)
    with pytest.raises(RolloutError, match=r"shared memory of \d+ bytes"):
        SharedWeights(PLAN, memory.path)


def test_the_slowest_writer_counts() -> None:
    memory = SharedWeights(PLAN)
    memory.progress[0] = 3
    memory.progress[1] = 1
    memory.wait(1, 1.0)
    with pytest.raises(RolloutError, match="the trainer has written 1 of 3 tensors"):
        memory.wait(2, 0.05)
