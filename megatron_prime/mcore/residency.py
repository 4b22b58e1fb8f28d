"""Offloads a model's memory while the model does not compute, and restores it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from megatron_prime.interfaces import Resident

_EXACT_SIZES = "pinned_max_cached_size_mb:4"


class ParkedStorages:
    """Offloads the memory of tensors for a time; views of them stay valid objects.

    On CUDA, copies run on a stream of their own: `park` returns at once, and the memory is reused after its copy has
    finished. The host memory is pinned once and kept.

    Args:
        keeps_values: false for memory whose values are not needed again; it comes back as zeros.
    """

    def __init__(self, *, keeps_values: bool = True) -> None:
        self._keeps_values = keeps_values
        self._parked: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []
        self._hosts: dict[int, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    @property
    def is_parked(self) -> bool:
        return bool(self._parked)

    def park(self, tensors: Iterable[torch.Tensor]) -> None:
        """Frees the tensors' memory; none of them may be read until `restore`."""
        assert not self._parked
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for number, storage in enumerate(storages.values()):
            host = self._to_host(storage, number) if self._keeps_values else None
            self._parked.append((storage, storage.nbytes(), host))
            # The storage object survives with no bytes, so that views, buckets and optimizer states still point at it.
            storage.resize_(0)

    def restore(self) -> None:
        """Brings the memory and its values back, in the order of the current stream."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        for storage, num_bytes, host in self._parked:
            storage.resize_(num_bytes)
            values = _bytes_of(storage)
            if host is None:
                values.zero_()
            else:
                values.copy_(host, non_blocking=True)
        self._parked = []

    def _to_host(self, storage: torch.UntypedStorage, number: int) -> torch.Tensor:
        values = _bytes_of(storage)
        if values.device.type != "cuda":
            return values.clone()
        host = self._hosts.get(number)
        if host is None or host.numel() != values.numel():
            pin_exact_sizes()
            host = self._hosts[number] = torch.empty(values.numel(), dtype=torch.uint8, pin_memory=True)
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(values, non_blocking=True)
        # Without this the caching allocator could reuse the memory before the copy on the other stream has read it.
        values.record_stream(stream)
        return host


@functools.cache
def pin_exact_sizes() -> None:
    """Makes torch pin exactly as much host memory as requested (above a few MiB) instead of the next power of two.

    Torch also returns such memory when it is freed, instead of caching it for another tensor.
    """
    # A setting that is not repeated falls back to its default.
    settings = torch._C._accelerator_getAllocatorSettings()
    if _EXACT_SIZES.partition(":")[0] not in settings:
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, (settings, _EXACT_SIZES))))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType]


class Residency:
    """Controls which parts of one model are in the accelerator's memory; all of it until the first `sleep`.

    Args:
        gives_away: ``none``; ``gradients``: their buffers, which every update fills from zero, and FP8 copies of
            weights, which every pass makes anew; ``all``: weights and optimizer states to host memory as well.
    """

    def __init__(self, gives_away: Literal["none", "gradients", "all"]) -> None:
        self._gives_away = gives_away
        self._weights = ParkedStorages()
        self._states = ParkedStorages()
        self._gradients = ParkedStorages(keeps_values=False)

    def sleep(self, chunks: Sequence[torch.nn.Module], wrapped: Sequence[Any] = (), optimizer: Any = None) -> None:
        """Offloads what may be offloaded and has not been yet.

        Args:
            chunks: the parts of the model.
            wrapped: the same in Megatron's data-parallel wrapper; none for a frozen model.
            optimizer: Megatron's, of a trained model.
        """
        if self._gives_away == "none":
            return
        _drop_fp8_copies(chunks)
        buffers = [b for ddp in wrapped for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        if not self._gradients.is_parked:
            self._gradients.park(buffer.grad_data for buffer in buffers)
        if self._gives_away == "gradients":
            return
        weights = [p.data for chunk in chunks for p in chunk.parameters()]
        # A float32 model has no masters: its optimizer steps the weights themselves, which are parked below.
        shared = {weight.untyped_storage().data_ptr() for weight in weights}
        if not self._states.is_parked:
            self._states.park(s for s in _states_of(optimizer) if s.untyped_storage().data_ptr() not in shared)
        if not self._weights.is_parked:
            self._weights.park(weights)

    def wake(self, *, training: bool) -> None:
        """Brings back the weights, and for training the rest."""
        self._weights.restore()
        if training:
            self._states.restore()
            self._gradients.restore()


@contextmanager
def awake(role: Resident) -> Iterator[None]:
    """A ``with`` block in which a model's weights, gradients and optimizer states are there; behind it they sleep."""
    role.wake(training=True)
    yield
    role.sleep()


def _drop_fp8_copies(chunks: Sequence[torch.nn.Module]) -> None:
    """Frees the copies of weights that Transformer Engine's layers make in a pass's first micro-batch, and keep."""
    for module in itertools.chain(*(chunk.modules() for chunk in chunks)):
        copies: Any = getattr(module, "_fp8_workspaces", None)
        if copies:
            copies.clear()


def _states_of(optimizer: Any) -> list[torch.Tensor]:
    """Moments and float32 masters of Megatron's optimizer, on the accelerator."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer]) if optimizer is not None else []
    found = [parameter.data for part in parts for parameter in part.get_parameters()]
    for part in parts:
        found += [x for state in part.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    # A step count of one number lies on the CPU wherever Adam is not fused.
    return [x for x in found if x.numel() > 1]
