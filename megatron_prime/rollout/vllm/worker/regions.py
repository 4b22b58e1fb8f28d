"""Which regions of Hugging Face tensors a vLLM worker's parameters are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_prime.weights.shards import Range, Ranges

Shapes = Mapping[str, tuple[int, ...]]
"""Of whole Hugging Face tensors, by name."""


@dataclass(frozen=True, slots=True)
class Part:
    """A region of a Hugging Face tensor and where its rows start in a worker's parameter."""

    name: str
    ranges: Ranges
    first_row: int

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter's rows that hold the region."""
        start, stop = self.ranges[0]
        return parameter[self.first_row : self.first_row + stop - start]


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter of a worker's model and what it is made of."""

    where: str
    layer: Any
    parameter: Tensor
    parts: tuple[Part, ...]
    """In the order of the parameter's rows."""
    missing: tuple[str, ...]
    """Tensors that it should be made of and that there are not; `parts` is empty then."""
    is_whole: bool
    """Whether the tensors have as many rows as the layer says, where its shares do not follow from theirs."""

    @property
    def fits(self) -> bool:
        """Whether the parts fill the parameter; an embedding has rows behind the vocabulary."""
        if not self.parts or not self.is_whole:
            return False
        num_rows = sum(stop - start for (start, stop), *_ in (part.ranges for part in self.parts))
        rest = {tuple(stop - start for start, stop in part.ranges[1:]) for part in self.parts}
        may_be_longer = isinstance(self.layer, VocabParallelEmbedding)
        is_filled = num_rows <= len(self.parameter) if may_be_longer else num_rows == len(self.parameter)
        return is_filled and rest == {tuple(self.parameter.shape[1:])}


def parameters_of(model: Any, shapes: Shapes) -> Iterator[Held]:
    """Every parameter of a worker's model.

    Args:
        model: vLLM's, fused and cut as it is.
        shapes: of the tensors that are sent.
    """
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    for path, layer in model.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            names = _hf_names(path, kind, fused)
            if isinstance(layer, ParallelLMHead) and names[0] not in shapes:
                names = ["model.embed_tokens.weight"]
            missing = tuple(name for name in names if name not in shapes)
            parts = () if missing else tuple(_parts(layer, kind, [(name, shapes[name]) for name in names]))
            rows = _num_rows(layer)
            is_whole = rows is None or missing != () or rows == [shapes[name][0] for name in names]
            yield Held(f"{path}.{kind}", layer, parameter, parts, missing, is_whole)


def _hf_names(path: str, kind: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    parent, _, last = path.rpartition(".")
    return [f"{parent}.{part}.{kind}".removeprefix(".") for part in fused.get(last, (last,))]


def _parts(layer: Any, kind: str, tensors: Sequence[tuple[str, Sequence[int]]]) -> list[Part]:
    """This worker's regions of the tensors that its parameter is made of, in the order of its rows."""
    shares: list[Range | None] = [None] * len(tensors)
    columns: Range | None = None
    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        shares = [(indices.org_vocab_start_index, indices.org_vocab_end_index)]
    elif isinstance(layer, QKVParallelLinear):
        rank, heads = layer.tp_rank, (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        ranks = (rank, rank // layer.num_kv_head_replicas, rank // layer.num_kv_head_replicas)
        sizes = [count * layer.head_size for count in heads]
        shares = [(r * size, (r + 1) * size) for r, size in zip(ranks, sizes, strict=True)]
    elif isinstance(layer, ColumnParallelLinear):
        shares = [_share(shape[0], layer.tp_rank, layer.tp_size) for _, shape in tensors]
    elif isinstance(layer, RowParallelLinear) and kind == "weight":
        columns = _share(tensors[0][1][1], layer.tp_rank, layer.tp_size)
    parts: list[Part] = []
    first_row = 0
    for (name, shape), share in zip(tensors, shares, strict=True):
        rows = share or (0, shape[0])
        rest = [(0, size) for size in shape[1:]]
        parts.append(Part(name, (rows, *([columns] if columns else rest)), first_row))
        first_row += rows[1] - rows[0]
    return parts


def _num_rows(layer: Any) -> list[int] | None:
    """Of the whole tensors, where a worker's shares come from the layer's numbers and not from their shapes."""
    if isinstance(layer, VocabParallelEmbedding):
        return [layer.org_vocab_size]
    if isinstance(layer, QKVParallelLinear):
        num_kv_rows = layer.total_num_kv_heads * layer.head_size
        return [layer.total_num_heads * layer.head_size, num_kv_rows, num_kv_rows]
    return None


def _share(size: int, rank: int, num_ranks: int) -> Range:
    return rank * size // num_ranks, (rank + 1) * size // num_ranks
