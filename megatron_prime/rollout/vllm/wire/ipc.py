"""Weights between processes on one host: two buckets that the trainer fills and every worker of an engine reads.

On GPUs the buckets are CUDA memory that workers open by its IPC handle, on a CPU they are shared host memory. How many
buckets are full, and how many each reader is done with, are counters in shared host memory; they only ever grow, so
what a lost reader may still write means nothing to the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.wire.shared_memory import SharedMemory, aligned

_POLL_SECONDS = 0.0002
_DEVICE_ARGUMENT = 6
"""Of `rebuild_cuda_tensor`: number of the memory's GPU, as this process counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketOffer:
    """Where readers find the buckets."""

    path: str
    """Shared memory of the counters and, on a CPU, of the buckets."""
    bucket_bytes: int
    num_readers: int
    cuda_handle: tuple[Any, ...] | None
    """Arguments of `rebuild_cuda_tensor`; None: the buckets are in the shared memory."""
    gpu: str
    """Which GPU that is, by a name that all processes know; empty on a CPU."""


class SharedBuckets:
    """The trainer's end (`buckets.Channel`).

    Args:
        bucket_bytes: size of each of the two.
        num_readers: workers of the engine.
        device: where they lie.
        timeout_seconds: the longest wait for a reader.
        is_lost: whether the readers are gone.

    Raises:
        RolloutError: there is not enough host memory.
    """

    def __init__(
        self,
        bucket_bytes: int,
        num_readers: int,
        device: torch.device,
        timeout_seconds: float,
        is_lost: Callable[[], bool],
    ) -> None:
        on_gpu = device.type == "cuda"
        self._memory = SharedMemory(_counter_bytes(num_readers) + (0 if on_gpu else 2 * bucket_bytes))
        self._counters = self._memory.bytes[: 8 * (1 + num_readers)].view(torch.int64)
        if on_gpu:
            both = torch.empty(2 * bucket_bytes, dtype=torch.uint8, device=device)
        else:
            both = self._memory.bytes[_counter_bytes(num_readers) :]
        self.buckets = both.split(bucket_bytes)
        self.offer = BucketOffer(
            path=self._memory.path,
            bucket_bytes=bucket_bytes,
            num_readers=num_readers,
            cuda_handle=reduce_tensor(both)[1] if on_gpu else None,
            gpu=_gpu_name(device.index) if on_gpu else "",
        )
        self._timeout_seconds = timeout_seconds
        self._is_lost = is_lost
        self.num_filled = 0
        """Buckets so far, in all sets."""

    def begin(self, data: Tensor) -> int:
        """Says that a bucket (`data`, one of `buckets` or its first bytes) is full."""
        _synchronize(data)
        self.num_filled += 1
        self._counters[0] = self.num_filled
        return self.num_filled

    def wait(self, work: int) -> None:
        """Returns when all readers are done with a bucket.

        Raises:
            RolloutError: they are lost, or one does not read on.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while int(self._counters[1:].min()) < work:
            # The last thing that a reader does before it says that it is ready is to count.
            if self._is_lost() and int(self._counters[1:].min()) < work:
                raise RolloutError("the engine reads no more")
            if time.monotonic() > deadline:
                raise RolloutError(f"the engine has not read on for {self._timeout_seconds:g} seconds")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Frees the memory, as soon as readers do."""
        self._memory.close()


class BucketReader:
    """A worker's end (`buckets.Channel`).

    Args:
        offer: of the trainer.
        reader: which of the workers.
        timeout_seconds: the longest wait for a bucket.

    Raises:
        RolloutError: the trainer is gone.
        ValueError: the trainer's GPU is hidden from this process.
    """

    def __init__(self, offer: BucketOffer, reader: int, timeout_seconds: float) -> None:
        start = _counter_bytes(offer.num_readers)
        if offer.cuda_handle is None:
            self._memory = SharedMemory(start + 2 * offer.bucket_bytes, offer.path)
            both = self._memory.bytes[start:]
        else:
            self._memory = SharedMemory(start, offer.path)
            arguments = list(offer.cuda_handle)
            arguments[_DEVICE_ARGUMENT] = _gpu_number(offer.gpu)
            both = rebuild_cuda_tensor(*arguments)
        self._counters = self._memory.bytes[: 8 * (1 + offer.num_readers)].view(torch.int64)
        self._buckets = both.split(offer.bucket_bytes)
        self.offer = offer
        self._reader = reader
        self._timeout_seconds = timeout_seconds
        self._first = self._next = 0

    def start(self, first: int) -> None:
        """A new set starts behind so many buckets."""
        self._first = self._next = first

    def begin(self, data: Tensor) -> tuple[int, Tensor]:
        """Says where the next bucket shall go."""
        self._next += 1
        return self._next, data

    def wait(self, work: tuple[int, Tensor]) -> None:
        """Fetches a bucket as soon as it is full.

        Raises:
            RolloutError: the trainer sends no more.
        """
        number, data = work
        deadline = time.monotonic() + self._timeout_seconds
        while int(self._counters[0]) < number:
            if time.monotonic() > deadline:
                raise RolloutError(f"the trainer has sent nothing for {self._timeout_seconds:g} seconds")
            time.sleep(_POLL_SECONDS)
        data.copy_(self._buckets[(number - self._first - 1) % 2][: len(data)])
        _synchronize(data)
        self._counters[1 + self._reader] = number

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()


def _counter_bytes(num_readers: int) -> int:
    return aligned(8 * (1 + num_readers))


def _synchronize(data: Tensor) -> None:
    """The processes' streams know nothing of each other."""
    if data.is_cuda:
        torch.cuda.current_stream(data.device).synchronize()


def _gpu_name(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).uuid)


def _gpu_number(name: str) -> int:
    for number in range(torch.cuda.device_count()):
        if _gpu_name(number) == name:
            return number
    raise ValueError(
        f"the trainer's GPU {name} is not among the engine's CUDA_VISIBLE_DEVICES; "
        "use rollout.vllm.transfer=shared_memory"
    )
