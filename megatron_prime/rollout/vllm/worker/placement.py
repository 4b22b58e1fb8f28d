"""An engine's parameters in the memory that the trainer writes: where both lay weights out alike, nothing is copied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from megatron_prime.rollout.vllm.wire.shared_memory import SharedWeights, TensorEntry
from megatron_prime.rollout.vllm.worker.regions import Held, Part, parameters_of
from megatron_prime.weights.shards import cut


class Placement:
    """Puts those parameters of a worker's model into shared memory that lie there in one piece.

    vLLM's fused parameters (q, k and v; gate and up) are tensors one behind the other, as the plan has them. Of several
    workers' parameters only those that are rows of a single tensor lie there; the others, embeddings with rows behind
    the vocabulary and other dtypes are copied.

    Args:
        model: vLLM's, whose layers compute on a CPU with their parameters themselves (not repacked ones).
        weights: mapped by this process for as long as the model is used.
    """

    def __init__(self, model: Any, weights: SharedWeights) -> None:
        entries = {entry.name: entry for entry in weights.plan.entries}
        shapes = {name: entry.shape for name, entry in entries.items()}
        self._copies: dict[str, list[tuple[Tensor, Part]]] = defaultdict(list)
        seen: set[int] = set()
        for held in parameters_of(model, shapes):
            parameter = held.parameter
            # A tied head has its embedding's.
            if id(parameter) in seen or not held.fits:
                continue
            seen.add(id(parameter))
            if place := _piece(held, entries):
                parameter.data = weights.bytes[slice(*place)].view(parameter.dtype).view(parameter.shape)
            else:
                # What other weights were read from can not be written to.
                parameter.data = parameter.data.clone()
                for part in held.parts:
                    self._copies[part.name].append((part.of(parameter.data), part))

    def load(self, name: str, tensor: Tensor) -> None:
        """Copies a tensor, or this worker's part of it, to where it is not yet.

        vLLM's own loading of single tensors takes longer than the copy.

        Args:
            name: of the Hugging Face tensor.
            tensor: what was sent, in the memory.
        """
        for values, part in self._copies.get(name, ()):
            values.copy_(cut(tensor, part.ranges))


def _piece(held: Held, entries: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
    """Where in the memory a parameter lies as it is, from its first byte to behind its last; None: nowhere."""
    parameter: Tensor = held.parameter
    places: list[tuple[int, int]] = []
    for part in held.parts:
        entry = entries[part.name]
        whole_rows = all(bounds == (0, size) for bounds, size in zip(part.ranges[1:], entry.shape[1:], strict=True))
        if not whole_rows or str(parameter.dtype) != f"torch.{entry.dtype}":
            return None
        row_bytes = entry.num_bytes // entry.shape[0]
        start, stop = part.ranges[0]
        places.append((entry.offset + start * row_bytes, entry.offset + stop * row_bytes))
    if not places or any(stop != start for (_, stop), (start, _) in pairwise(places)):
        return None
    first, last = places[0][0], places[-1][1]
    # An embedding may have rows behind the vocabulary.
    return (first, last) if parameter.is_contiguous() and last - first == parameter.nbytes else None
