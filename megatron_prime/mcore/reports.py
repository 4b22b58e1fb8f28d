"""Collects losses and metrics from the head's chunks, over micro-batches, to all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prime.mcore.losses import TokenLoss
from megatron_prime.mcore.packing import MicroBatch
from megatron_prime.mcore.parallel import Layout


def reduce_metrics(layout: Layout, reports: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Sums (``max_*``: maximises) the micro-batches' metrics over this rank and all others."""
    # A context-parallel rank may own no answer at all, and stages before the last have no reports; they learn the
    # names along with the values.
    reports = [report for report in reports if report]
    names = sorted(reports[0]) if reports else []
    if layout.cp_size > 1 and layout.is_last_stage:
        every: list[Any] = [None] * layout.cp_size
        torch.distributed.all_gather_object(every, names, group=layout.cp_group)
        names = max(every, key=len)
    if layout.pp_size > 1:
        box: list[Any] = [names]
        torch.distributed.broadcast_object_list(
            box, src=layout.last_stage_rank, group=layout.pp_group, device=layout.device
        )
        names = box[0]
    maximised = [n for n in names if n.startswith("max_")]
    summed = [n for n in names if not n.startswith("max_")]

    def stacked(keys: list[str], nothing: float) -> torch.Tensor:
        if not reports:
            return torch.full((1, len(keys)), nothing, dtype=torch.float64)
        return torch.stack([torch.stack([r[k].detach().double().cpu() for k in keys]) for r in reports])

    sums = layout.sum_over_data(stacked(summed, 0.0).sum(dim=0))
    result = dict(zip(summed, sums.tolist(), strict=True))
    if maximised:
        maxima = layout.max_over_data(stacked(maximised, -math.inf).amax(dim=0))
        result |= dict(zip(maximised, maxima.tolist(), strict=True))
    return result


@dataclass(frozen=True, slots=True)
class ReportingLoss:
    """A token loss as the head calls it for each of its chunks."""

    loss: TokenLoss
    micro_batch: MicroBatch
    reports: list[Mapping[str, torch.Tensor]]
    """Collects loss and metrics of each chunk."""
    kept: torch.Tensor | None
    """[B, R], receives log-probs; None: they are not kept."""

    def __call__(self, logprobs: torch.Tensor, entropy: torch.Tensor | None, chunk: slice) -> torch.Tensor:
        """Loss of a chunk of the micro-batch's response tokens."""
        tokens = self.micro_batch.part(chunk)
        value, metrics = self.loss(logprobs, entropy, tokens)
        self.reports.append({"loss": value.detach(), **metrics})
        if self.kept is not None:
            self.kept[tokens.rows, tokens.columns] = logprobs.detach().float().cpu()
        return value


def combined(reports: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Metrics of a micro-batch from those of its chunks; none where it has no response tokens on this rank."""
    if not reports:
        return {}
    stacked = {name: torch.stack([report[name].detach() for report in reports]) for name in reports[0]}
    return {name: x.amax(dim=0) if name.startswith("max_") else x.sum(dim=0) for name, x in stacked.items()}
