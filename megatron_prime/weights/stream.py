"""Moves weights between a Hugging Face folder, the ranks that hold them, and readers of the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import WeightSpec
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.sharding import local_shape, local_slice, merge
from megatron_prime.weights.shards import ShardSlice, check_cover, shard_slices


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelGroups:
    """The model-parallel groups of this rank; a group of one rank may be None."""

    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    """Ranks of a stage over which the experts are divided; each expert is whole on one of them. The group takes ranks
    of the tensor-parallel group first, then those of further copies of the other weights. The larger of the two groups
    holds the whole stage."""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks that together hold a stage of the model."""
        return max(self.tp_size, self.ep_size)

    @property
    def stage_rank(self) -> int:
        """This rank's number among them."""
        return self.ep_rank if self.ep_size > self.tp_size else self.tp_rank

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """These ranks."""
        return self.ep_group if self.ep_size > self.tp_size else self.tp_group

    def expert_rank(self, spec: WeightSpec, architecture: ModelArchitecture) -> int | None:
        """The expert-parallel rank that holds an expert, None for other weights."""
        if spec.expert is None or architecture.experts is None:
            return None
        return spec.expert * self.ep_size // architecture.experts.num_experts


@dataclass(frozen=True, slots=True)
class _Owner:
    stage: int
    num_rows: int
    """Rows of one shard."""
    dtype: torch.dtype
    ep_rank: int | None
    """The expert-parallel rank that holds it; None: not an expert."""


class WeightExport:
    """Exports a model's weights: whole tensors one by one, or each rank's own slices of them.

    All ranks agree at the first use on who sends what, and keep it.

    Args:
        specs: `weight_specs` of the model.
        architecture: the model.
        local: gives this rank's shards by global Megatron name (see `export_stream`).
        groups: this rank's place among the ranks that share the model.
    """

    def __init__(
        self,
        specs: Sequence[WeightSpec],
        architecture: ModelArchitecture,
        local: Callable[[], Mapping[str, Tensor]],
        groups: ParallelGroups,
    ) -> None:
        self._specs = specs
        self._architecture = architecture
        self._local = local
        self.groups = groups
        self._owners: dict[str, _Owner] | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors (`export_stream`); a collective."""
        owners = self._agreed_owners()
        return export_stream(self._specs, self._architecture, self._local(), self.groups, owners=owners)

    def tensors(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every Hugging Face tensor; a collective at the first use.

        Raises:
            WeightsError: on every rank alike, if the ranks' slices are not exactly the model.
        """
        planned = self._owners is not None
        owners = self._agreed_owners()
        found = [
            (name, tuple(shape), owners[spec.megatron_name].dtype)
            for spec in self._specs
            for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
        ]
        if not planned:
            mine = [(part.name, part.ranges) for part in self.slices()]
            everyone = self.gather(mine)
            check_cover({name: shape for name, shape, _ in found}, [part for parts in everyone for part in parts])
        return found

    def slices(self) -> Iterator[ShardSlice]:
        """This rank's part of the tensors; all ranks' parts together are the model, nothing twice."""
        owners, local, groups = self._agreed_owners(), self._local(), self.groups
        for spec in self._specs:
            owner = owners[spec.megatron_name]
            # The larger of the tensor- and expert-parallel groups holds the stage several times over for the smaller
            # one; only its first ranks send, so that nothing is sent twice.
            if owner.ep_rank is None:
                mine = groups.stage_rank < groups.tp_size
            else:
                mine = groups.stage_rank < groups.ep_size and owner.ep_rank == groups.ep_rank
            if mine and owner.stage == groups.pp_rank:
                shard = local[spec.megatron_name].detach()
                number = groups.tp_rank if owner.ep_rank is None else 0
                yield from shard_slices(spec, self._architecture, shard, tp_rank=number, tp_size=groups.tp_size)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, over the ranks that share this copy of the model; a collective."""
        groups = self.groups
        stage = _all_gather_object(value, groups.stage_group, groups.stage_size)
        return [item for part in _all_gather_object(stage, groups.pp_group, groups.pp_size) for item in part]

    def _agreed_owners(self) -> dict[str, _Owner]:
        if self._owners is None:
            self._owners = _find_owners(self._specs, self._architecture, self._local(), self.groups)
        return self._owners


def export_stream(
    specs: Sequence[WeightSpec],
    architecture: ModelArchitecture,
    local: Mapping[str, Tensor],
    groups: ParallelGroups,
    *,
    dtype: torch.dtype | None = None,
    owners: Mapping[str, _Owner] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model as a whole Hugging Face tensor, on every rank, in the order of `specs`.

    A collective: all ranks of the groups must iterate to the end. One weight exists as a whole at a time. Its
    pipeline stage gathers it over tensor-parallel ranks (broadcasts it over expert-parallel ones, if it is an expert)
    and broadcasts it to the other stages; of a weight that several stages hold (a tied embedding) the first one counts.

    Args:
        specs: `weight_specs` of the model.
        architecture: the model.
        local: this rank's shards by global Megatron name (`WeightSpec.megatron_name`); a last stage that keeps a
            copy of a tied embedding has it under the embedding's name or not at all.
        groups: where this rank is and whom it shares the model with.
        dtype: converts every weight to this before it is sent; None keeps each weight's own.
        owners: which stage sends each weight, where it was found before (`WeightExport`).

    Yields:
        (Hugging Face name, tensor) on the device of `local`. The tensor may be the parameter's own memory and is
        valid until the next step of the iteration: read it, or copy it to keep or change it.

    Raises:
        WeightsError: on every rank alike and before anything is sent, if ranks together lack a weight, have one
            that is unknown, or have shapes that contradict the architecture; lists all.
    """
    if owners is None:
        owners = _find_owners(specs, architecture, local, groups)
    device = next(iter(local.values())).device
    for spec in specs:
        owner = owners[spec.megatron_name]
        for name, tensor in _whole(spec, architecture, local, groups, owner, dtype or owner.dtype, device):
            if groups.pp_group is not None and groups.pp_size > 1:
                dist.broadcast(tensor, src=dist.get_global_rank(groups.pp_group, owner.stage), group=groups.pp_group)
            yield name, tensor


@torch.no_grad()
def import_weights(
    specs: Sequence[WeightSpec],
    architecture: ModelArchitecture,
    folder: HfFolder,
    local: Mapping[str, Tensor],
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> None:
    """Fills this rank's parameters in place from a folder, reading only the slices that it owns.

    Args:
        specs: `weight_specs` of the model.
        architecture: the model.
        folder: the weights; call its `validate` before building the model.
        local: this rank's parameters by global Megatron name; values are cast to their dtype and device.
        tp_rank: tensor-parallel rank.
        tp_size: tensor-parallel ranks.
        padded_vocab_size: rows of the whole embedding in Megatron.

    Raises:
        WeightsError: a parameter has no spec or another shape than its shard; lists all, before any is written.
    """
    by_name = {spec.megatron_name: spec for spec in specs}
    problems = []
    for name, parameter in local.items():
        problems += _problems_of(
            name, tuple(parameter.shape), by_name, architecture, tp_size=tp_size, padded_vocab_size=padded_vocab_size
        )
    if problems:
        raise WeightsError("\n".join(problems))
    for name, parameter in local.items():
        shard = local_slice(
            by_name[name],
            architecture,
            folder.fetch,
            tp_rank=tp_rank,
            tp_size=tp_size,
            padded_vocab_size=padded_vocab_size,
        )
        parameter.copy_(shard)


def _problems_of(
    name: str,
    shape: tuple[int, ...],
    specs: Mapping[str, WeightSpec],
    architecture: ModelArchitecture,
    *,
    tp_size: int,
    padded_vocab_size: int,
) -> list[str]:
    if name not in specs:
        return [f"{name}: not a weight of this {architecture.family} architecture"]
    expected = local_shape(specs[name], architecture, tp_size=tp_size, padded_vocab_size=padded_vocab_size)
    return [] if shape == expected else [f"{name}: the shard has shape {shape}, expected {expected}"]


def _find_owners(
    specs: Sequence[WeightSpec], architecture: ModelArchitecture, local: Mapping[str, Tensor], groups: ParallelGroups
) -> dict[str, _Owner]:
    """Finds the stage that sends each weight; every rank sees every rank's shapes, so all decide alike."""
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in local.items()}
    stages = _all_gather_object(
        _all_gather_object(mine, groups.stage_group, groups.stage_size), groups.pp_group, groups.pp_size
    )
    by_name = {spec.megatron_name: spec for spec in specs}
    fewest_vocab_rows = -(-architecture.vocab_size // groups.tp_size)
    owners: dict[str, _Owner] = {}
    problems = []
    expert_ranks = {spec.megatron_name: groups.expert_rank(spec, architecture) for spec in specs}

    def held_by(shards: dict[str, Any], expert_rank: int | None) -> dict[str, Any]:
        return {name: what for name, what in shards.items() if expert_ranks.get(name) == expert_rank}

    for stage, ranks in enumerate(stages):
        for number, shards in enumerate(ranks):
            # Weights outside of experts must be those of the stage's first rank, experts those of the rank with the
            # same expert-parallel number.
            expert_rank = number % groups.ep_size
            if shards != held_by(ranks[0], None) | held_by(ranks[expert_rank], expert_rank):
                problems.append(f"pipeline stage {stage}: its ranks differ in names, shapes or dtypes of weights")
                break
        for name, (shape, dtype) in {name: what for shards in ranks for name, what in shards.items()}.items():
            num_rows = shape[0] if shape else 0
            owners.setdefault(name, _Owner(stage, num_rows, dtype, expert_ranks.get(name)))
            # The trainer decides how far the vocabulary is padded, so any sufficient number of rows is accepted.
            padded = max(num_rows, fewest_vocab_rows) * groups.tp_size
            problems += _problems_of(
                name, shape, by_name, architecture, tp_size=groups.tp_size, padded_vocab_size=padded
            )
    problems += [f"{name}: no rank has it" for name in by_name if name not in owners]
    if problems:
        raise WeightsError("\n".join(problems))
    return owners


def _whole(
    spec: WeightSpec,
    architecture: ModelArchitecture,
    local: Mapping[str, Tensor],
    groups: ParallelGroups,
    owner: _Owner,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors of a weight: whole on the owning stage, room to receive them on the others."""
    on_stage = owner.stage == groups.pp_rank
    if on_stage and owner.ep_rank in (None, groups.ep_rank):
        shard = local[spec.megatron_name].detach().to(dtype)
        shards = [shard] if spec.is_whole else _gather(shard, groups)
        tensors = merge(spec, architecture, shards, owner.num_rows * groups.tp_size)
    else:
        tensors = [
            (name, torch.empty(shape, dtype=dtype, device=device))
            for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
        ]
    if on_stage and owner.ep_rank is not None and groups.ep_group is not None and groups.ep_size > 1:
        source = dist.get_global_rank(groups.ep_group, owner.ep_rank)
        for _, tensor in tensors:
            dist.broadcast(tensor, src=source, group=groups.ep_group)
    return tensors


def _gather(shard: Tensor, groups: ParallelGroups) -> list[Tensor]:
    if groups.tp_size == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
    dist.all_gather(shards, shard, group=groups.tp_group)
    return shards


def _all_gather_object(value: Any, group: dist.ProcessGroup | None, size: int) -> list[Any]:
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values
