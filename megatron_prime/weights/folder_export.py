"""A Hugging Face folder's weights in the form in which a trainer's model gives its own to an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.hf_folder import HfFolder, expected_shapes
from megatron_prime.weights.shards import ShardSlice


class FolderExport:
    """Reads a validated folder in one process, with the interface of `stream.WeightExport`.

    Args:
        folder: checked with `HfFolder.validate`.
        architecture: its model.
        dtype: what engines are given.
    """

    def __init__(self, folder: HfFolder, architecture: ModelArchitecture, dtype: torch.dtype) -> None:
        self._folder = folder
        self._shapes = expected_shapes(architecture)
        self._dtype = dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time."""
        for name, shape in self._shapes.items():
            yield name, self._folder.fetch(name, tuple(slice(0, size) for size in shape)).to(self._dtype)

    def tensors(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor."""
        return [(name, shape, self._dtype) for name, shape in self._shapes.items()]

    def slices(self) -> Iterator[ShardSlice]:
        """Every tensor as one slice."""
        for name, tensor in self:
            yield ShardSlice(name, tuple((0, size) for size in tensor.shape), tensor)

    def gather(self, value: Any) -> list[Any]:
        """This process's value, there being no other."""
        return [value]
