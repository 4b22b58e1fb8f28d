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
from megatron_prime.weights.shards import NUM_DIGEST_BYTES, Ranges

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
        offset += _aligned(entry.num_bytes)
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


class SharedWeights:
    """The tensors of a plan in one shared mapping, with how far each writer is and the checksums of all slices.

    A reader may follow the writers: `wait` returns when a tensor is complete.

    Args:
        plan: what lies where.
        path: mapping to open; None creates one.
        writable: writes reach all processes; otherwise a write stays private to this one.

    Raises:
        RolloutError: there is not enough memory, or the mapping is gone.
    """

    def __init__(self, plan: SharedPlan, path: str | None = None, *, writable: bool = True) -> None:
        num_tensor_bytes = max((e.offset + e.num_bytes for e in plan.entries), default=0)
        progress_start = _aligned(num_tensor_bytes)
        digests_start = _aligned(progress_start + 8 * plan.num_writers)
        num_bytes = digests_start + NUM_DIGEST_BYTES * len(plan.slices) + 1
        try:
            if path is None:
                descriptor = os.memfd_create("megatron_prime_weights", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, num_bytes)
                path = f"/proc/{os.getpid()}/fd/{descriptor}"
            else:
                descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            if writable:
                memory = mmap.mmap(descriptor, num_bytes)
            else:
                # Shared, so that later writes of the others are seen; nothing here writes.
                memory = mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise RolloutError(f"shared memory of {num_bytes} bytes for the weights: {error}") from error
        self._descriptor = descriptor
        self.path = path
        self.plan = plan
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.image = whole[:num_tensor_bytes]
        """All tensors as bytes."""
        self.tensors: dict[str, torch.Tensor] = {}
        for entry in plan.entries:
            bits = whole[entry.offset : entry.offset + entry.num_bytes]
            self.tensors[entry.name] = bits.view(getattr(torch, entry.dtype)).view(entry.shape)
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
        os.close(self._descriptor)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
