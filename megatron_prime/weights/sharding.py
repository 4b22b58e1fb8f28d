"""Cutting a tensor-parallel shard out of Hugging Face tensors, and putting shards together again.

Column, qkv and gate_up are one sharding with a different number of blocks: a shard is a sequence of
blocks, and each block has its share of rows from every source tensor. qkv has a block per query
group, the others have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import Sharding, WeightSpec

Slices = tuple[slice, ...]
Fetch = Callable[[str, Slices], Tensor]
"""Reads the given slice (one `slice` per dimension) of the Hugging Face tensor of that name."""


def local_shape(
    spec: WeightSpec, architecture: ModelArchitecture, *, tp_size: int, padded_vocab_size: int
) -> tuple[int, ...]:
    """Shape of one tensor-parallel shard of a weight.

    Args:
        spec: the weight.
        architecture: its model.
        tp_size: tensor-parallel ranks; an expert is whole on any of them.
        padded_vocab_size: rows of the whole embedding in Megatron.

    Returns:
        The shape, the same on every rank.

    Raises:
        WeightsError: the weight cannot be cut evenly; names the setting.
    """
    first = spec.hf_shapes[0]
    tp_size = 1 if spec.is_whole else tp_size
    match spec.sharding:
        case Sharding.REPLICATED:
            return first
        case Sharding.ROW:
            return (first[0], _share(first[1], tp_size, f"columns of {spec.hf_names[0]}"), *first[2:])
        case Sharding.VOCAB:
            if padded_vocab_size < first[0]:
                raise WeightsError(f"padded_vocab_size: {padded_vocab_size} is less than vocab_size {first[0]}")
            return (_share(padded_vocab_size, tp_size, "padded_vocab_size"), *first[1:])
        case Sharding.QKV | Sharding.QKV_BIAS:
            _share(architecture.num_attention_heads, tp_size, "num_attention_heads")
            _share(architecture.num_query_groups, tp_size, "num_key_value_heads")
        case Sharding.GATE_UP:
            shared = ".shared_expert." in spec.hf_names[0]
            _share(first[0], tp_size, "shared_expert_intermediate_size" if shared else "intermediate_size")
        case Sharding.COLUMN:
            _share(first[0], tp_size, f"rows of {spec.hf_names[0]}")
    return (sum(shape[0] for shape in spec.hf_shapes) // tp_size, *first[1:])


def local_slice(
    spec: WeightSpec,
    architecture: ModelArchitecture,
    fetch: Fetch,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> Tensor:
    """One rank's shard of a weight, reading nothing but that shard.

    Args:
        spec: the weight.
        architecture: its model.
        fetch: reads a slice of a Hugging Face tensor.
        tp_rank: which shard, 0 .. tp_size - 1.
        tp_size: tensor-parallel ranks.
        padded_vocab_size: rows of the whole embedding in Megatron; rows past the vocabulary are zero.

    Returns:
        The shard, of `local_shape`; it may share memory with what `fetch` returned.

    Raises:
        WeightsError: the weight cannot be cut evenly; names the setting.
    """
    shape = local_shape(spec, architecture, tp_size=tp_size, padded_vocab_size=padded_vocab_size)
    tp_rank, tp_size = (0, 1) if spec.is_whole else (tp_rank, tp_size)

    def cut(index: int, dim: int, start: int, stop: int) -> Tensor:
        slices = [slice(0, size) for size in spec.hf_shapes[index]]
        slices[dim] = slice(start, stop)
        return fetch(spec.hf_names[index], tuple(slices))

    match spec.sharding:
        case Sharding.REPLICATED:
            return cut(0, 0, 0, shape[0])
        case Sharding.ROW:
            return cut(0, 1, tp_rank * shape[1], (tp_rank + 1) * shape[1])
        case Sharding.VOCAB:
            vocab_size = spec.hf_shapes[0][0]
            start = min(tp_rank * shape[0], vocab_size)
            rows = cut(0, 0, start, min(start + shape[0], vocab_size))
            return (
                rows if len(rows) == shape[0] else torch.cat([rows, rows.new_zeros(shape[0] - len(rows), *shape[1:])])
            )
    num_blocks = spec.num_blocks(architecture, tp_size)
    parts = []
    for index, hf_shape in enumerate(spec.hf_shapes):
        num_rows = hf_shape[0] // tp_size
        part = cut(index, 0, tp_rank * num_rows, (tp_rank + 1) * num_rows)
        parts.append(part.reshape(num_blocks, num_rows // num_blocks, *hf_shape[1:]))
    return torch.cat(parts, dim=1).reshape(shape)


def merge(
    spec: WeightSpec, architecture: ModelArchitecture, shards: Sequence[Tensor], padded_vocab_size: int
) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors of a weight from the shards of all tensor-parallel ranks.

    Args:
        spec: the weight.
        architecture: its model.
        shards: every rank's shard in rank order; one is enough for a weight that ranks hold whole.
        padded_vocab_size: rows of the whole embedding in Megatron; padding is trimmed.

    Returns:
        (Hugging Face name, contiguous tensor) in the order of `spec.hf_names`; may share memory with the shards.

    Raises:
        WeightsError: a shard has not the shape that the architecture says.
    """
    shards = shards[:1] if spec.is_whole else shards
    tp_size = len(shards)
    shape = local_shape(spec, architecture, tp_size=tp_size, padded_vocab_size=padded_vocab_size)
    for rank, shard in enumerate(shards):
        if tuple(shard.shape) != shape:
            raise WeightsError(f"{spec.megatron_name}: shard {rank} has shape {tuple(shard.shape)}, expected {shape}")
    name = spec.hf_names[0]
    match spec.sharding:
        case Sharding.REPLICATED:
            return [(name, shards[0].contiguous())]
        case Sharding.ROW:
            return [(name, _join(shards, dim=1))]
        case Sharding.VOCAB:
            return [(name, _join(shards, dim=0)[: spec.hf_shapes[0][0]])]
    num_blocks = spec.num_blocks(architecture, tp_size)
    rows_per_block = [hf_shape[0] // tp_size // num_blocks for hf_shape in spec.hf_shapes]
    blocks = [
        shard.reshape(num_blocks, sum(rows_per_block), *shape[1:]).split(rows_per_block, dim=1) for shard in shards
    ]
    return [
        (name, _join([part[index] for part in blocks], dim=0).reshape(spec.hf_shapes[index]))
        for index, name in enumerate(spec.hf_names)
    ]


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def _share(size: int, tp_size: int, what: str) -> int:
    if size % tp_size:
        raise WeightsError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide {what} {size}; choose a divisor of it"
        )
    return size // tp_size
