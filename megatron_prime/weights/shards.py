"""A rank's shards as slices of Hugging Face tensors: weights go where they belong without being gathered first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import Layout, WeightSpec

Range = tuple[int, int]


Ranges = tuple[Range, ...]
"""(start, stop) per dimension."""

NUM_DIGEST_BYTES = 16
_BLOCK_WORDS, _PIECE_BLOCKS, _HALF = 8192, 1024, 2**32 - 1


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """A slice of a Hugging Face tensor with its values."""

    name: str
    ranges: Ranges
    values: Tensor


def cut(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The part of a tensor in `ranges`, sharing its memory."""
    return tensor[tuple(slice(*bounds) for bounds in ranges)]


def digest(values: Tensor) -> bytes:
    """Checksum of a tensor's values (not of its name or shape, which plans carry).

    XXH3 (xxhash.com) reads at the speed of memory, 27 GB/s on one core where `WeightChecksum` reads 2.5; it is for
    errors, not against adversaries. A tensor on an accelerator is copied to the host for it.

    Args:
        values: any dtype, device and strides.
    """
    data: Any = values.detach().cpu().contiguous()
    return xxhash.xxh3_128_digest(data.view(-1).view(torch.uint8).numpy())


def digest_on(device: torch.device, values: Tensor) -> bytes:
    """The checksum that a device computes where it has the values: on a CPU `digest`, elsewhere one that reads no less.

    A GPU reduces every block of 64 KiB to eight bytes (`block_sums`), which go to the host for `digest`.

    Args:
        device: both sides of a comparison name the same kind.
        values: any dtype, device and strides.
    """
    values = values.detach().to(device)
    return digest(values if device.type == "cpu" else block_sums(values))


def block_sums(values: Tensor) -> Tensor:
    """A universal hash of every block of a tensor's bytes.

    NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO 1999): the sum over words of (low half + key) times
    (high half + key), halves modulo 2^32 and the sum modulo 2^64. Two different blocks agree with probability 2^-32.

    Args:
        values: any dtype, device and strides.

    Returns:
        [blocks] int64, on the device of the values.
    """
    data = values.contiguous().view(-1).view(torch.uint8)
    low_keys, high_keys = _nh_keys(data.device)
    sums = []
    # A piece at a time: products take as much memory as the words.
    for piece in data.split(8 * _BLOCK_WORDS * _PIECE_BLOCKS):
        missing = -len(piece) % (8 * _BLOCK_WORDS)
        words = torch.nn.functional.pad(piece, (0, missing)) if missing else piece
        words = words.view(torch.int64).view(-1, _BLOCK_WORDS)
        low, high = (words + low_keys) & _HALF, ((words >> 32) + high_keys) & _HALF
        sums.append((low * high).sum(1))
    return torch.cat(sums) if sums else data.new_empty(0, dtype=torch.int64)


@cache
def _nh_keys(device: torch.device) -> Tensor:
    return torch.randint(2**32, (2, _BLOCK_WORDS), generator=torch.Generator().manual_seed(0)).to(device)


def shard_slices(
    spec: WeightSpec, architecture: ModelArchitecture, shard: Tensor, *, tp_rank: int, tp_size: int
) -> list[ShardSlice]:
    """What a tensor-parallel shard holds of the Hugging Face tensors of a weight (the inverse of `local_slice`).

    Args:
        spec: the weight.
        architecture: its model.
        shard: of `local_shape`.
        tp_rank: which shard, 0 .. tp_size - 1.
        tp_size: tensor-parallel ranks.

    Returns:
        Disjoint slices that cover the tensors together with those of the other ranks; a weight that is
        whole on every rank is the first rank's alone, and padding rows of the vocabulary nobody's.
    """
    first = spec.hf_shapes[0]
    if spec.is_whole:
        if tp_rank > 0:
            return []
        tp_size = 1
    match spec.layout:
        case Layout.REPLICATED:
            return [_rows(spec.hf_names[0], first, 0, shard)]
        case Layout.ROW:
            start = tp_rank * shard.shape[1]
            ranges = ((0, first[0]), (start, start + shard.shape[1]), *((0, size) for size in first[2:]))
            return [ShardSlice(spec.hf_names[0], ranges, shard)]
        case Layout.VOCAB:
            start = min(tp_rank * shard.shape[0], first[0])
            rows = shard[: max(min(first[0] - start, shard.shape[0]), 0)]
            return [_rows(spec.hf_names[0], first, start, rows)] if len(rows) else []
    num_blocks = architecture.num_query_groups // tp_size if spec.layout in (Layout.QKV, Layout.QKV_BIAS) else 1
    num_rows = [shape[0] // tp_size for shape in spec.hf_shapes]
    blocks = shard.reshape(num_blocks, sum(num_rows) // num_blocks, *first[1:])
    parts = blocks.split([rows // num_blocks for rows in num_rows], dim=1)
    # Block by block: the rows of one tensor are not one piece of the shard's memory.
    return [
        _rows(name, shape, tp_rank * rows + number * rows // num_blocks, block)
        for name, shape, rows, part in zip(spec.hf_names, spec.hf_shapes, num_rows, parts, strict=True)
        for number, block in enumerate(part)
    ]


def check_cover(shapes: Mapping[str, tuple[int, ...]], slices: Iterable[tuple[str, Ranges]]) -> None:
    """Makes sure that slices tile tensors: nothing missing, nothing twice.

    Args:
        shapes: of the whole tensors.
        slices: name and ranges of every slice of every rank.

    Raises:
        WeightsError: lists all tensors that are not covered exactly.
    """
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


def find_non_finite(slices: Iterable[ShardSlice]) -> list[str]:
    """Names of the slices that hold NaN or an infinity."""
    found = []
    for part in slices:
        # A finite sum has finite terms, and is read at the speed of memory. One that is not may have overflowed.
        if not part.values.numel() or torch.isfinite(part.values.sum()):
            continue
        # NaN and infinities both survive in the extremes; no temporary of the tensor's size.
        low, high = torch.aminmax(part.values)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            found.append(part.name)
    return found


def _rows(name: str, shape: tuple[int, ...], start: int, values: Tensor) -> ShardSlice:
    return ShardSlice(name, ((start, start + len(values)), *((0, size) for size in shape[1:])), values)
