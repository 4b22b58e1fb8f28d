"""Describes a rank's shards as slices of Hugging Face tensors, so that weights move without being gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import Sharding, WeightSpec

Range = tuple[int, int]
Ranges = tuple[Range, ...]
"""(start, stop) per dimension."""


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """A slice of a Hugging Face tensor with its values."""

    name: str
    ranges: Ranges
    values: Tensor
    dim: int = 0
    """Dimension along which tensor parallelism cuts the tensor, if it does."""


def cut(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The part of a tensor in `ranges`, sharing its memory."""
    return tensor[tuple(slice(*bounds) for bounds in ranges)]


def cut_for_workers(part: ShardSlice, size: int, num_workers: int) -> list[ShardSlice]:
    """A slice in pieces that end where the equal parts of several workers do, so that each can be one worker's alone.

    Args:
        part: the slice.
        size: of the whole tensor along the slice's `dim`.
        num_workers: tensor-parallel ranks.
    """
    start, stop = part.ranges[part.dim]
    edges = [start, *(edge for n in range(1, num_workers) if start < (edge := n * size // num_workers) < stop), stop]
    if len(edges) == 2:
        return [part]
    return [
        ShardSlice(
            part.name,
            (*part.ranges[: part.dim], (first, last), *part.ranges[part.dim + 1 :]),
            part.values.narrow(part.dim, first - start, last - first),
            part.dim,
        )
        for first, last in pairwise(edges)
    ]


def shard_slices(
    spec: WeightSpec, architecture: ModelArchitecture, shard: Tensor, *, tp_rank: int, tp_size: int
) -> list[ShardSlice]:
    """What a tensor-parallel shard holds of the Hugging Face tensors of a weight.

    Column, qkv and gate_up are one sharding with a different number of blocks: a shard is a sequence of blocks, and
    each block has its share of rows from every source tensor. qkv has a block per query group, the others have one.

    Args:
        spec: the weight.
        architecture: its model.
        shard: of `local_shape`.
        tp_rank: which shard, 0 .. tp_size - 1.
        tp_size: tensor-parallel ranks.

    Returns:
        Disjoint slices that cover the tensors together with those of the other ranks; a weight that is
        whole on every rank is given by the first rank only, and padding rows of the vocabulary by none.
    """
    first = spec.hf_shapes[0]
    if spec.is_whole:
        if tp_rank > 0:
            return []
        tp_size = 1
    match spec.sharding:
        case Sharding.REPLICATED:
            return [_rows(spec.hf_names[0], first, 0, shard)]
        case Sharding.ROW:
            start = tp_rank * shard.shape[1]
            ranges = ((0, first[0]), (start, start + shard.shape[1]), *((0, size) for size in first[2:]))
            return [ShardSlice(spec.hf_names[0], ranges, shard, dim=1)]
        case Sharding.VOCAB:
            start = min(tp_rank * shard.shape[0], first[0])
            rows = shard[: max(min(first[0] - start, shard.shape[0]), 0)]
            return [_rows(spec.hf_names[0], first, start, rows)] if len(rows) else []
    num_blocks = architecture.num_query_groups // tp_size if spec.sharding in (Sharding.QKV, Sharding.QKV_BIAS) else 1
    num_rows = [shape[0] // tp_size for shape in spec.hf_shapes]
    blocks = shard.reshape(num_blocks, sum(num_rows) // num_blocks, *first[1:])
    parts = blocks.split([rows // num_blocks for rows in num_rows], dim=1)
    # One slice per block: in a fused shard (q, k, v per query group) a tensor's rows are not contiguous.
    return [
        _rows(name, shape, tp_rank * rows + number * rows // num_blocks, block)
        for name, shape, rows, part in zip(spec.hf_names, spec.hf_shapes, num_rows, parts, strict=True)
        for number, block in enumerate(part)
    ]


def check_cover(shapes: Mapping[str, tuple[int, ...]], slices: Iterable[tuple[str, Ranges]]) -> None:
    """Checks that slices tile tensors: nothing missing, nothing twice.

    Args:
        shapes: of the whole tensors.
        slices: name and ranges of every slice of every rank.

    Raises:
        WeightsError: lists all tensors that are not covered exactly.
    """
    # Counting elements alone would miss one slice sent twice in place of another of the same size: hence the set.
    covered = dict.fromkeys(shapes, 0)
    problems: list[str] = []
    seen: set[tuple[str, Ranges]] = set()
    for name, ranges in slices:
        if name not in shapes:
            problems.append(f"{name}: the model has no such tensor")
            continue
        if (name, ranges) in seen or any(stop > size for (_, stop), size in zip(ranges, shapes[name], strict=True)):
            problems.append(f"{name}: the slice {ranges} is twice there or outside of {list(shapes[name])}")
        seen.add((name, ranges))
        covered[name] += torch.Size([stop - start for start, stop in ranges]).numel()
    problems += [
        f"{name}: {covered[name]} of {torch.Size(shape).numel()} elements would be sent"
        for name, shape in shapes.items()
        if covered[name] != torch.Size(shape).numel()
    ]
    if problems:
        raise WeightsError("\n".join(problems))


def _rows(name: str, shape: tuple[int, ...], start: int, values: Tensor) -> ShardSlice:
    return ShardSlice(name, ((start, start + len(values)), *((0, size) for size in shape[1:])), values)
