"""What a vLLM worker really holds, compared with what the trainer has.

vLLM fuses, cuts and (on a CPU) repacks what it loads, and 0.32 accepts several incomplete or wrong sets without a
word. So every parameter of the model is compared after each update: by the trainer's own checksums where a slice of
the trainer lies in this worker as a whole, else bit for bit with what was sent, whose checksum is compared then. A
repacked matrix cannot be read; its columns can: the product with a unit vector is a column, exactly. Small models
have all columns read back, large ones a few that differ from update to update.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan
from megatron_prime.rollout.vllm.worker.regions import Part, parameters_of
from megatron_prime.weights.digests import digest_on
from megatron_prime.weights.shards import Ranges, cut

_MAX_PROBE_OPERATIONS = 2_000_000_000
_NUM_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class _Values:
    """What this worker has of a region of a tensor."""

    where: str
    values: Tensor
    ranges: Ranges


class EngineCheck:
    """Compares everything that a worker's model holds with what the trainer has, tensor by tensor.

    Args:
        model: the worker's, whose parameters have the place that they will keep.
        plan: what is sent.
        compare_digests: compare the trainer's checksums too.
        device: where checksums are computed (`digest_on`).
    """

    def __init__(self, model: Any, plan: SharedPlan, *, compare_digests: bool, device: torch.device) -> None:
        shapes = {entry.name: entry.shape for entry in plan.entries}
        self.num_columns = _num_columns(model)
        """Read back of each repacked matrix; 0 without such."""
        self._plan = plan
        self._device = device
        self._slices: dict[str, list[tuple[int, Ranges]]] = {name: [] for name in shapes}
        if compare_digests:
            for number, (name, ranges) in enumerate(plan.slices):
                self._slices[name].append((number, ranges))
        self._held: dict[str, list[_Values]] = {name: [] for name in shapes}
        self._packed: list[tuple[str, Any, Sequence[Part]]] = []
        self._unread: set[int] = set()
        """Slices of which what was sent is to be compared."""
        self._found: list[tuple[int, bytes, str]] = []
        """Slice, checksum of what is here, and where it is."""
        self._problems: list[str] = []
        self._unseen = set(shapes)
        for held in parameters_of(model, shapes):
            if held.missing:
                self._problems.append(f"{held.where}: holds values for which nothing was sent ({list(held.missing)})")
                continue
            self._unseen -= {part.name for part in held.parts}
            if not held.is_whole or (held.parameter.numel() and not held.fits):
                sent = {part.name: list(shapes[part.name]) for part in held.parts}
                self._problems.append(f"{held.where}: what was sent has other sizes: {sent}")
                continue
            self._add(held.where, held.layer, held.parameter.data, held.parts)

    def loaded(self, name: str, tensor: Tensor) -> None:
        """Compares a tensor with what the model has made of it.

        Args:
            name: of the Hugging Face tensor, whose loading is over.
            tensor: what was sent.
        """
        unread = {number for number, _ in self._slices[name] if number in self._unread}
        for held in self._held[name]:
            if not self._equals(held, name, tensor, unread):
                self._problems.append(f"{held.where}: is not what was sent")
        for number, ranges in self._slices[name]:
            if number in unread:
                self._found.append((number, digest_on(self._device, cut(tensor, ranges)), "on its way"))

    def finish(self, sent: Mapping[str, Tensor], digests: Callable[[], Tensor]) -> None:
        """Compares what has to wait until everything is loaded.

        Args:
            sent: the tensors, where a matrix was repacked.
            digests: waits for the trainer's checksums.

        Raises:
            ValueError: names what differs, what the engine has beyond, and what it does not have at all.
        """
        for where, layer, parts in self._packed:
            if not _probe(layer, [cut(sent[part.name], part.ranges) for part in parts], self.num_columns):
                self._problems.append(f"{where}: is not what was sent")
        problems = self._problems + [f"{name}: was sent and is nowhere in the engine" for name in sorted(self._unseen)]
        if self._found:
            expected = [row.tobytes() for row in digests().cpu().numpy()]
            problems += [
                f"{self._plan.slices[number][0]}{[list(bounds) for bounds in self._plan.slices[number][1]]}: "
                f"changed ({where})"
                for number, found, where in self._found
                if found != expected[number]
            ]
        if problems:
            raise ValueError(f"the engine's weights differ: {problems[:6]} ({len(problems)} in all)")

    def _add(self, where: str, layer: Any, parameter: Tensor, parts: Sequence[Part]) -> None:
        is_there, is_packed = parameter.numel() > 0, hasattr(layer, "cpu_linear")
        if is_there:
            # An embedding is padded to whole tiles behind the vocabulary.
            for part in parts:
                self._held[part.name].append(_Values(where, part.of(parameter), part.ranges))
        elif not is_packed and any(start < stop for part in parts for start, stop in part.ranges[:1]):
            self._problems.append(f"{where}: is not what was sent")
        # A head keeps its parameter beside the repacked copy.
        is_probed = is_packed and (not is_there or bool(self.num_columns and isinstance(layer, ParallelLMHead)))
        if is_probed:
            self._packed.append((where, layer, parts))
        if is_probed or not is_there:
            for part in parts:
                self._unread |= {n for n, ranges in self._slices[part.name] if _intersection(ranges, part.ranges)}

    def _equals(self, held: _Values, name: str, tensor: Tensor, unread: set[int]) -> bool:
        """Whether values are those of the region, bit for bit or (known later) by checksum."""
        values, slices = held.values, self._slices[name]
        if values.dtype != tensor.dtype or not slices:
            unread |= {number for number, ranges in slices if _intersection(ranges, held.ranges)}
            return _equal(values, cut(tensor, held.ranges))
        for number, ranges in slices:
            if (common := _intersection(ranges, held.ranges)) is None:
                continue
            here = cut(values, tuple((a - c, b - c) for (a, b), (c, _) in zip(common, held.ranges, strict=True)))
            if common == ranges:
                self._found.append((number, digest_on(self._device, here), held.where))
            else:
                unread.add(number)
                if not _equal(here, cut(tensor, common)):
                    return False
        return True


def _equal(values: Tensor, expected: Tensor) -> bool:
    expected = expected.to(values.device, values.dtype)
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
    # A packed head has no such sizes.
    linears = [layer for layer in model.modules() if is_packed(layer) and hasattr(layer, "output_size")]
    shapes = [(layer.output_size, layer.input_size) for layer in linears]
    if not shapes:
        return 0
    if sum(rows * columns * columns for rows, columns in shapes) <= _MAX_PROBE_OPERATIONS:
        return max(columns for _, columns in shapes)
    return _NUM_COLUMNS


def is_packed(layer: Any) -> bool:
    """Whether oneDNN holds this layer's matrix and the parameter itself is empty."""
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "cpu_linear") and isinstance(weight, Tensor) and weight.numel() == 0


def _probe(layer: Any, regions: Sequence[Tensor], num_columns: int) -> bool:
    """Reads columns of the matrix that a layer computes with, and compares them."""
    size = regions[0].shape[1]
    chosen = sorted(random.sample(range(size), min(num_columns, size)))
    units = torch.zeros(len(chosen), size, dtype=regions[0].dtype, device=regions[0].device)
    units[range(len(chosen)), chosen] = 1
    expected = torch.cat([region[:, chosen] for region in regions]).T
    columns = layer.cpu_linear(units, layer.weight, None)[:, : expected.shape[1]]
    return torch.equal(columns.to(expected.dtype), expected)
