"""What a vLLM worker really holds, compared with the tensors that it was given.

vLLM fuses, cuts and (on a CPU) repacks what it loads, and 0.32 accepts several incomplete or wrong sets without a
word. So every parameter of the model is compared bit for bit after each update. A repacked matrix cannot be read;
its columns can: the product with a unit vector is a column, exactly. Small models have all columns read back, large
ones a few that differ from update to update.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

_MAX_PROBE_OPERATIONS = 2_000_000_000
_NUM_COLUMNS = 16


def check_engine(model: Any, tensors: Mapping[str, Tensor]) -> int:
    """Compares everything that a worker's model holds with what it was sent.

    Args:
        model: the worker's model.
        tensors: whole Hugging Face tensors by name.

    Returns:
        Columns read back of each repacked matrix; 0 without such.

    Raises:
        ValueError: names what differs, what the engine has beyond, and what it does not have at all.
    """
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    num_columns = _num_columns(model)
    problems: list[str] = []
    compared: set[str] = set()
    for path, layer in model.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            names = _hf_names(path, kind, fused)
            if isinstance(layer, ParallelLMHead) and names[0] not in tensors:
                names = ["model.embed_tokens.weight"]
            if missing := [name for name in names if name not in tensors]:
                problems.append(f"{path}.{kind}: holds values for which nothing was sent ({missing})")
                continue
            compared.update(names)
            expected = _local(layer, kind, [tensors[name] for name in names])
            if not _holds(layer, kind, parameter.data, expected, num_columns):
                problems.append(f"{path}.{kind}: is not what was sent")
    problems += [f"{name}: was sent and is nowhere in the engine" for name in sorted(tensors.keys() - compared)]
    if problems:
        raise ValueError(f"the engine's weights differ: {problems[:6]} ({len(problems)} in all)")
    return num_columns


def _num_columns(model: Any) -> int:
    """How many columns of each repacked matrix to read: all that the budget allows, 0 without such matrices."""
    shapes = [(layer.output_size, layer.input_size) for layer in model.modules() if _is_packed_linear(layer)]
    if not shapes:
        return 0
    if sum(rows * columns * columns for rows, columns in shapes) <= _MAX_PROBE_OPERATIONS:
        return max(columns for _, columns in shapes)
    return _NUM_COLUMNS


def _is_packed_linear(layer: Any) -> bool:
    return hasattr(layer, "cpu_linear") and hasattr(layer, "output_size") and layer.weight.numel() == 0


def _hf_names(path: str, kind: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    parent, _, last = path.rpartition(".")
    return [f"{parent}.{part}.{kind}".removeprefix(".") for part in fused.get(last, (last,))]


def _local(layer: Any, kind: str, tensors: Sequence[Tensor]) -> Tensor:
    """This worker's part of a parameter, put together as vLLM's layer has it."""
    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        return tensors[0][indices.org_vocab_start_index : indices.org_vocab_end_index]
    if isinstance(layer, QKVParallelLinear):
        head_size, rank = layer.head_size, layer.tp_rank
        key_value_rank = rank // layer.num_kv_head_replicas
        shares = [(rank, layer.num_heads), (key_value_rank, layer.num_kv_heads), (key_value_rank, layer.num_kv_heads)]
        return torch.cat(
            [
                tensor[part * heads * head_size : (part + 1) * heads * head_size]
                for tensor, (part, heads) in zip(tensors, shares, strict=True)
            ]
        )
    if isinstance(layer, MergedColumnParallelLinear | ColumnParallelLinear):
        return torch.cat([tensor.chunk(layer.tp_size, dim=0)[layer.tp_rank] for tensor in tensors])
    if isinstance(layer, RowParallelLinear) and kind == "weight":
        return tensors[0].chunk(layer.tp_size, dim=1)[layer.tp_rank]
    return tensors[0]


def _holds(layer: Any, kind: str, parameter: Tensor, expected: Tensor, num_columns: int) -> bool:
    """Whether a parameter, and the repacked copy that the layer computes with, have these values."""
    if parameter.numel() > 0:
        # An embedding is padded to whole tiles behind the vocabulary.
        values = parameter[: len(expected)]
        if values.shape != expected.shape or not torch.equal(values, expected.to(values.dtype)):
            return False
    elif kind != "weight" or not hasattr(layer, "cpu_linear"):
        return expected.numel() == 0
    if kind != "weight" or not hasattr(layer, "cpu_linear"):
        return True
    size = expected.shape[1]
    chosen = sorted(random.sample(range(size), min(num_columns or _NUM_COLUMNS, size)))
    units = torch.zeros(len(chosen), size, dtype=expected.dtype, device=expected.device)
    units[range(len(chosen)), chosen] = 1
    columns = layer.cpu_linear(units, layer.weight, None)[:, : len(expected)]
    return torch.equal(columns.to(expected.dtype), expected[:, chosen].T)
