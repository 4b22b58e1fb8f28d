"""An engine's parameters in the memory that the trainer writes: where both lay weights out alike, nothing is copied."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from torch import Tensor

from megatron_prime.rollout.vllm.regions import Held, parameters_of
from megatron_prime.rollout.vllm.shared_weights import SharedWeights, TensorEntry


def place(model: Any, weights: SharedWeights) -> frozenset[str]:
    """Puts those parameters of a worker's model into shared memory that lie there in one piece.

    vLLM's fused parameters (q, k and v; gate and up) are tensors one behind the other, as the plan has them. Left out
    are a worker's cuts of tensors, embeddings with rows behind the vocabulary, and other dtypes.

    Args:
        model: vLLM's, whose layers compute with their parameters themselves (not repacked ones).
        weights: mapped by this process for as long as the model is used.

    Returns:
        Names of the tensors that need not be loaded: every parameter with a part of them lies where they are written.
    """
    entries = {entry.name: entry for entry in weights.plan.entries}
    shapes = {name: entry.shape for name, entry in entries.items()}
    uses: Counter[str] = Counter()
    placed: Counter[str] = Counter()
    for held in parameters_of(model, shapes):
        names = [part.name for part in held.parts]
        uses.update(names)
        if names and _lies_in_one_piece(held, [entries[name] for name in names]):
            first, last = entries[names[0]], entries[names[-1]]
            data = weights.bytes[first.offset : last.end].view(held.parameter.dtype)
            held.parameter.data = data.view(held.parameter.shape)
            placed.update(names)
    return frozenset(name for name, count in placed.items() if count == uses[name])


def _lies_in_one_piece(held: Held, entries: list[TensorEntry]) -> bool:
    parameter: Tensor = held.parameter
    return (
        parameter.device.type == "cpu"
        and parameter.is_contiguous()
        and all(str(parameter.dtype) == f"torch.{entry.dtype}" for entry in entries)
        and all(
            part.ranges == tuple((0, size) for size in entry.shape)
            for part, entry in zip(held.parts, entries, strict=True)
        )
        and parameter.numel() * parameter.element_size() == sum(entry.num_bytes for entry in entries)
        and all(one.end == other.offset for one, other in pairwise(entries))
    )
