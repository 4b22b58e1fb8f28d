"""A whole set of weights in memory that trainer ranks write and engine processes read, on one host.

The memory is an anonymous file (memfd): other processes of the user open it by the creator's /proc entry, /dev/shm's
size does not limit it, and the kernel frees it when the last process that maps it is gone, however it went.
"""

from __future__ import annotations

import mmap
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prime.errors import RolloutError
from megatron_prime.weights.digests import NUM_DIGEST_BYTES
from megatron_prime.weights.shards import Ranges

TensorShape = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a whole Hugging Face tensor."""

_ALIGNMENT = 64
_POLL_SECONDS = 0.0002


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one Hugging Face tensor lies."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name in torch, as in ``bfloat16``."""
    offset: int
    """Bytes from the start."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + self.num_bytes

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """Its bytes as the tensor."""
        return data.view(getattr(torch, self.dtype)).view(self.shape)


def lay_out(tensors: Sequence[TensorShape]) -> tuple[TensorEntry, ...]:
    """Places tensors one behind the other.

    Args:
        tensors: name, shape and dtype of each.
    """
    entries: list[TensorEntry] = []
    offset = 0
    for name, shape, dtype in tensors:
        entry = TensorEntry(name, tuple(shape), str(dtype).removeprefix("torch."), offset)
        entries.append(entry)
        offset += aligned(entry.num_bytes)
    return tuple(entries)


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What lies in the memory and who writes it; the same for every refit of a run."""

    entries: tuple[TensorEntry, ...]
    slices: tuple[tuple[str, Ranges], ...]
    """Every writer's slices, writer after writer."""
    num_writers: int


def whole_tensors(entries: Sequence[TensorEntry]) -> SharedPlan:
    """The plan of a single writer that writes each tensor in one piece."""
    slices = tuple((entry.name, tuple((0, size) for size in entry.shape)) for entry in entries)
    return SharedPlan(tuple(entries), slices, num_writers=1)


class SharedMemory:
    """Bytes that processes on one host share.

    Args:
        num_bytes: how many.
        path: memory to open; None creates some, which is zero.
        writable: whether this process may write.

    Raises:
        RolloutError: there is not enough memory, or it is gone.
    """

    def __init__(self, num_bytes: int, path: str | None = None, *, writable: bool = True) -> None:
        try:
            if path is None:
                descriptor = os.memfd_create("megatron_prime_weights", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, num_bytes)
                path = f"/proc/{os.getpid()}/fd/{descriptor}"
            else:
                descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            # Shared in any case, so that later writes of the others are seen.
            protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
            memory = mmap.mmap(descriptor, num_bytes, prot=protection)
        except (OSError, ValueError) as error:
            raise RolloutError(f"shared memory of {num_bytes} bytes for the weights: {error}") from error
        self._descriptor = descriptor
        self.path = path
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8)

    def close(self) -> None:
        """Takes the path away; the memory goes with the last tensor that lies in it."""
        os.close(self._descriptor)


class SharedWeights:
    """The tensors of a plan in one shared mapping, with how far each writer is and the checksums of all slices.

    A reader may follow the writers: `wait` returns when a tensor is complete.

    Args:
        plan: what lies where.
        path: mapping to open; None creates one.
        writable: writes reach all processes; otherwise this process only reads.

    Raises:
        RolloutError: there is not enough memory, or the mapping is gone.
    """

    def __init__(self, plan: SharedPlan, path: str | None = None, *, writable: bool = True) -> None:
        progress_start = aligned(num_bytes_of(plan.entries))
        digests_start = aligned(progress_start + 8 * plan.num_writers)
        num_bytes = digests_start + NUM_DIGEST_BYTES * len(plan.slices) + 1
        self._memory = SharedMemory(num_bytes, path, writable=writable)
        self.path = self._memory.path
        self.plan = plan
        whole = self._memory.bytes
        self.bytes = whole[: num_bytes_of(plan.entries)]
        """All tensors, each at its entry's offset."""
        self.tensors = {entry.name: entry.view(whole[entry.offset : entry.end]) for entry in plan.entries}
        self.progress = whole[progress_start : progress_start + 8 * plan.num_writers].view(torch.int64)
        """Per writer, how many tensors of the plan are done as far as it is concerned; one more: its checksums, too."""
        digests = whole[digests_start : digests_start + NUM_DIGEST_BYTES * len(plan.slices)]
        self.digests = digests.view(len(plan.slices), NUM_DIGEST_BYTES)

    def wait(self, num_tensors: int, timeout_seconds: float) -> None:
        """Returns when all writers are done with the first `num_tensors` tensors.

        Raises:
            RolloutError: not in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while int(self.progress.min()) < num_tensors:
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"the trainer has written {int(self.progress.min())} of {len(self.plan.entries)} tensors "
                    f"and stopped {timeout_seconds:.0f} seconds ago"
                )
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Unmaps; tensors taken from here must not be used afterwards."""
        self.tensors.clear()
        self._memory.close()


def num_bytes_of(entries: Sequence[TensorEntry]) -> int:
    """From the start to the last tensor's end."""
    return max((entry.end for entry in entries), default=0)


def aligned(num_bytes: int) -> int:
    """Rounded up to where a tensor may start."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
