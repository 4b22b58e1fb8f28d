"""A whole set of weights in memory that trainer ranks write and engine processes read, on one host.

The memory is an anonymous file (memfd): other processes of the user open it by the creator's /proc entry, /dev/shm's
size does not limit it, and the kernel frees it when the last process that maps it is gone, however it went.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prime.errors import RolloutError

TensorShape = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a whole Hugging Face tensor."""

_ALIGNMENT = 64


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
        offset += -(-entry.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(entries)


class SharedWeights:
    """The tensors of `entries` in one shared mapping.

    Args:
        entries: from `lay_out`.
        path: mapping to open; None creates one.
        writable: writes reach all processes; otherwise a write stays private to this one.

    Raises:
        RolloutError: there is not enough memory, or the mapping is gone.
    """

    def __init__(self, entries: Sequence[TensorEntry], path: str | None = None, *, writable: bool = True) -> None:
        num_bytes = max((e.offset + e.num_bytes for e in entries), default=0) or 1
        try:
            if path is None:
                descriptor = os.memfd_create("megatron_prime_weights", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, num_bytes)
                path = f"/proc/{os.getpid()}/fd/{descriptor}"
            else:
                descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
            self._memory = mmap.mmap(descriptor, num_bytes, access=access)
        except OSError as error:
            raise RolloutError(f"shared memory of {num_bytes} bytes for the weights: {error}") from error
        self._descriptor = descriptor
        self.path = path
        self.entries = tuple(entries)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.tensors: dict[str, torch.Tensor] = {}
        for entry in entries:
            bits = whole[entry.offset : entry.offset + entry.num_bytes]
            self.tensors[entry.name] = bits.view(getattr(torch, entry.dtype)).view(entry.shape)

    def close(self) -> None:
        """Unmaps; tensors taken from here must not be used afterwards."""
        self.tensors.clear()
        os.close(self._descriptor)
