"""Cuts tensor-parallel shards out of Hugging Face tensors, and merges shards again.

`shards.shard_slices` says what of which tensor lies where in a shard; both directions follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import Sharding, WeightSpec
from megatron_prime.weights.shards import ShardSlice, cut, shard_slices

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

    def slices_of(shard: Tensor) -> list[ShardSlice]:
        return shard_slices(spec, architecture, shard, tp_rank=tp_rank, tp_size=tp_size)

    planned = slices_of(torch.empty(shape, device="meta"))
    parts = [fetch(part.name, tuple(slice(*bounds) for bounds in part.ranges)) for part in planned]
    if len(parts) == 1 and tuple(parts[0].shape) == shape:
        return parts[0]
    # A rank may hold nothing but padding: the dtype is that of an empty slice.
    empty = fetch(spec.hf_names[0], tuple(slice(0, 0) for _ in spec.hf_shapes[0]))
    shard = empty.new_zeros(shape)
    for place, part in zip(slices_of(shard), parts, strict=True):
        place.values.copy_(part)
    return shard


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
        WeightsError: a shard's shape is not the architecture's.
    """
    shards = shards[:1] if spec.is_whole else shards
    tp_size = len(shards)
    shape = local_shape(spec, architecture, tp_size=tp_size, padded_vocab_size=padded_vocab_size)
    for rank, shard in enumerate(shards):
        if tuple(shard.shape) != shape:
            raise WeightsError(f"{spec.megatron_name}: shard {rank} has shape {tuple(shard.shape)}, expected {shape}")
    parts: dict[str, list[ShardSlice]] = {name: [] for name in spec.hf_names}
    for rank, shard in enumerate(shards):
        for part in shard_slices(spec, architecture, shard, tp_rank=rank, tp_size=tp_size):
            parts[part.name].append(part)
    return [(name, _join(parts[name], shape)) for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)]


def _join(parts: Sequence[ShardSlice], shape: tuple[int, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0].values.contiguous()
    whole = parts[0].values.new_empty(shape)
    for part in parts:
        cut(whole, part.ranges).copy_(part.values)
    return whole


def _share(size: int, tp_size: int, what: str) -> int:
    if size % tp_size:
        raise WeightsError(
            f"parallel.tensor_model_parallel_size: {tp_size} does not divide {what} {size}; choose a divisor of it"
        )
    return size // tp_size
