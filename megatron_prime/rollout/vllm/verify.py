"""What a vLLM worker really holds, compared with what the trainer has.

vLLM fuses, cuts and (on a CPU) repacks what it loads, and 0.32 accepts several incomplete or wrong sets without a
word. So every parameter of the model is compared after each update: by the trainer's own checksums where a slice of
the trainer lies in this worker as a whole, else bit for bit with what was sent, whose checksum is compared then. A
repacked matrix cannot be read; its columns can: the product with a unit vector is a column, exactly. Small models
have all columns read back, large ones a few that differ from update to update.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_prime.rollout.vllm.messages import SharedUpdate
from megatron_prime.rollout.vllm.shared_weights import SharedWeights
from megatron_prime.weights.shards import Range, Ranges, cut, digest

_MAX_PROBE_OPERATIONS = 2_000_000_000
_NUM_COLUMNS = 16


def check_engine(model: Any, weights: SharedWeights, update: SharedUpdate) -> int:
    """Compares everything that a worker's model holds with what the trainer has.

    Args:
        model: the worker's model.
        weights: what was sent.
        update: says whether the trainer's checksums are compared too.

    Returns:
        Columns read back of each repacked matrix; 0 without such.

    Raises:
        ValueError: names what differs, what the engine has beyond, and what it does not have at all.
    """
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    num_columns = _num_columns(model)
    sent = _Sent(weights, update.compare_digests)
    problems: list[str] = []
    for path, layer in model.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            names = _hf_names(path, kind, fused)
            if isinstance(layer, ParallelLMHead) and names[0] not in weights.tensors:
                names = ["model.embed_tokens.weight"]
            if missing := [name for name in names if name not in weights.tensors]:
                problems.append(f"{path}.{kind}: holds values for which nothing was sent ({missing})")
                continue
            parts = _parts(layer, kind, [(name, weights.tensors[name]) for name in names])
            if not _holds(f"{path}.{kind}", layer, parameter.data, parts, sent, num_columns):
                problems.append(f"{path}.{kind}: is not what was sent")
    problems += [f"{name}: was sent and is nowhere in the engine" for name in sorted(sent.unseen)]
    problems += sent.changed(update.timeout_seconds)
    if problems:
        raise ValueError(f"the engine's weights differ: {problems[:6]} ({len(problems)} in all)")
    return num_columns


@dataclass(frozen=True, slots=True)
class _Part:
    """A region of a Hugging Face tensor and where its rows start in this worker's parameter."""

    name: str
    ranges: Ranges
    first_row: int

    def of(self, parameter: Tensor) -> Tensor:
        start, stop = self.ranges[0]
        return parameter[self.first_row : self.first_row + stop - start]


class _Sent:
    """What was sent, and the checksums of what arrived, to be compared when the trainer has written its own."""

    def __init__(self, weights: SharedWeights, compare_digests: bool) -> None:
        self._weights = weights
        self._slices: dict[str, list[tuple[int, Ranges]]] = {name: [] for name in weights.tensors}
        if compare_digests:
            for number, (name, ranges) in enumerate(weights.plan.slices):
                self._slices[name].append((number, ranges))
        self._found: list[tuple[int, bytes, str]] = []
        """Slice, checksum of what is here, and where it is."""
        self._unread: set[int] = set()
        """Slices of which what was sent is to be compared."""
        self.unseen = set(weights.tensors)

    def equals(self, part: _Part, values: Tensor, where: str) -> bool:
        """Whether a parameter's values are those of the region, bit for bit or (known later) by checksum."""
        tensor = self._weights.tensors[part.name]
        self.unseen.discard(part.name)
        slices = self._slices[part.name]
        if values.dtype != tensor.dtype or not slices:
            return _equal(values, cut(tensor, part.ranges).to(values.dtype)) and self.mark(part)
        for number, ranges in slices:
            if (common := _intersection(ranges, part.ranges)) is None:
                continue
            here = cut(values, tuple((a - c, b - c) for (a, b), (c, _) in zip(common, part.ranges, strict=True)))
            if common == ranges:
                self._found.append((number, digest(here), where))
            else:
                self._unread.add(number)
                if not _equal(here, cut(tensor, common)):
                    return False
        return True

    def mark(self, part: _Part) -> bool:
        """Notes that what was sent of the region has to be what the trainer has."""
        self.unseen.discard(part.name)
        self._unread |= {
            number for number, ranges in self._slices[part.name] if _intersection(ranges, part.ranges) is not None
        }
        return True

    def region(self, part: _Part) -> Tensor:
        """What was sent of the region."""
        return cut(self._weights.tensors[part.name], part.ranges)

    def changed(self, timeout_seconds: float) -> list[str]:
        """Slices that are not here as they are in the trainer."""
        plan = self._weights.plan
        for number in sorted(self._unread):
            name, ranges = plan.slices[number]
            self._found.append((number, digest(cut(self._weights.tensors[name], ranges)), "on its way"))
        if not self._found:
            return []
        self._weights.wait(len(plan.entries) + 1, timeout_seconds)
        expected = [row.tobytes() for row in self._weights.digests.numpy()]
        return [
            f"{plan.slices[number][0]}{[list(bounds) for bounds in plan.slices[number][1]]}: changed ({where})"
            for number, found, where in self._found
            if found != expected[number]
        ]


def _equal(values: Tensor, expected: Tensor) -> bool:
    if values.shape != expected.shape:
        return False
    # Bits in the widest words that fit: comparing bfloat16 as such is five times slower.
    return torch.equal(_words(values), _words(expected))


def _words(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().view(-1).view(torch.uint8)
    aligned = data.numel() % 8 == 0 and data.data_ptr() % 8 == 0
    return data.view(torch.int64) if aligned else data


def _intersection(one: Ranges, other: Ranges) -> Ranges | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


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


def _parts(layer: Any, kind: str, tensors: Sequence[tuple[str, Tensor]]) -> list[_Part]:
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
        shares = [_share(len(tensor), layer.tp_rank, layer.tp_size) for _, tensor in tensors]
    elif isinstance(layer, RowParallelLinear) and kind == "weight":
        columns = _share(tensors[0][1].shape[1], layer.tp_rank, layer.tp_size)
    parts: list[_Part] = []
    first_row = 0
    for (name, tensor), share in zip(tensors, shares, strict=True):
        rows = share or (0, len(tensor))
        rest = [(0, size) for size in tensor.shape[1:]]
        parts.append(_Part(name, (rows, *([columns] if columns else rest)), first_row))
        first_row += rows[1] - rows[0]
    return parts


def _share(size: int, rank: int, num_ranks: int) -> Range:
    return rank * size // num_ranks, (rank + 1) * size // num_ranks


def _holds(where: str, layer: Any, parameter: Tensor, parts: Sequence[_Part], sent: _Sent, num_columns: int) -> bool:
    """Whether a parameter, and the repacked copy that the layer computes with, have these values."""
    if parameter.numel() > 0:
        # An embedding is padded to whole tiles behind the vocabulary.
        if not all(sent.equals(part, part.of(parameter), where) for part in parts):
            return False
    elif not hasattr(layer, "cpu_linear"):
        return all(sent.mark(part) and sent.region(part).numel() == 0 for part in parts)
    # A head keeps its parameter beside the repacked copy.
    if parameter.numel() > 0 and not (num_columns and isinstance(layer, ParallelLMHead)):
        return True
    return _probe(layer, [sent.region(part) for part in parts if sent.mark(part)], num_columns)


def _probe(layer: Any, regions: Sequence[Tensor], num_columns: int) -> bool:
    """Reads columns of the matrix that a layer computes with, and compares them."""
    size = regions[0].shape[1]
    chosen = sorted(random.sample(range(size), min(num_columns, size)))
    units = torch.zeros(len(chosen), size, dtype=regions[0].dtype, device=regions[0].device)
    units[range(len(chosen)), chosen] = 1
    expected = torch.cat([region[:, chosen] for region in regions]).T
    columns = layer.cpu_linear(units, layer.weight, None)[:, : expected.shape[1]]
    return torch.equal(columns.to(expected.dtype), expected)
