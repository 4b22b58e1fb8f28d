"""Log-probs of given tokens straight from hidden states: the one op of policy, reference and PRM.

Logits exist for one chunk of tokens at a time and are recomputed in the backward pass, so memory does not grow
with tokens x vocabulary. Every formula works on logits minus their maximum and accumulates in float32 (float64 for
float64 inputs): the PRM's reward is a difference of two log-probs, which bfloat16 logits would drown in rounding.

Tensor parallelism: each rank holds `V_local` rows of the head, rank r those from r * V_local. Four numbers per token
(maximum, sum of exponentials, weighted sum, target logit) are gathered once per call and merged in rank order, so
every rank computes bitwise the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobResult:
    """What the op returns for T tokens, float32 (float64 for float64 inputs)."""

    logprobs: torch.Tensor
    """[T], differentiable, never above 0."""
    entropy: torch.Tensor | None
    """[T], of the whole distribution in nats, without gradient; None unless asked for."""


@dataclass(frozen=True, slots=True)
class _Shard:
    """The part of the vocabulary that this rank holds."""

    first_id: int
    num_rows: int
    """Real rows; the padding rows behind them take no part. May be 0."""
    group: dist.ProcessGroup | None
    """None: this rank holds the whole vocabulary."""

    def locate(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of each target in this shard (clamped to a valid one), and whether it is here at all."""
        rows = targets - self.first_id
        return rows.clamp(0, max(self.num_rows - 1, 0)), (rows >= 0) & (rows < self.num_rows)


def fused_linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    entropy: Literal["none", "metric"] = "none",
    chunk_tokens: int = 1024,
) -> LogprobResult:
    """Computes log softmax(hidden @ weight.T / temperature)[target] per token without the logits of all tokens.

    Differentiable once in `hidden` and `weight`, with any upstream gradient per token. Under tensor parallelism
    all ranks of the group call it with the same hidden states, targets and upstream gradients; the gradient of
    `hidden` comes back summed over the group.

    Args:
        hidden: [T, d]; any strides, T may be 0.
        weight: [V_local, d], this rank's rows of the head; same dtype as `hidden`.
        targets: integers [T], global token ids.
        vocab_size: real size of the whole vocabulary; rows from there on are padding and get no probability.
        temperature: divides the logits; one number or [T]. No gradient.
        tp_group: ranks that share the head, in order of their rows; None where this rank holds all of it.
        entropy: `metric` also returns the entropy, which has no gradient.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        Log-probs and entropy, bitwise identical on all ranks of the group.

    Raises:
        ValueError: shapes or dtypes that do not belong together, a temperature that is not positive, or a target
            outside of the vocabulary.
    """
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    _check_arguments(hidden, weight, targets, temperature, vocab_size, tp_size, chunk_tokens)
    first_id = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    shard = _Shard(
        first_id=first_id,
        num_rows=min(max(vocab_size - first_id, 0), weight.shape[0]),
        group=tp_group if tp_size > 1 else None,
    )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    temperatures = torch.as_tensor(temperature, dtype=dtype, device=hidden.device).detach().expand(hidden.shape[0])
    logprobs, entropies = _LinearLogprob.apply(
        hidden, weight, targets.long(), temperatures, shard, entropy == "metric", chunk_tokens
    )
    return LogprobResult(logprobs=logprobs, entropy=entropies if entropy == "metric" else None)


def _check_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    vocab_size: int,
    tp_size: int,
    chunk_tokens: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [T, d] and [V_local, d]")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: both must have one floating-point dtype")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets {list(targets.shape)} of {targets.dtype} must be [T={hidden.shape[0]}] integers")
    if not 1 <= vocab_size <= weight.shape[0] * tp_size:
        raise ValueError(f"vocab_size {vocab_size} does not fit {tp_size} shard(s) of {weight.shape[0]} rows")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens} and must be at least 1")
    if isinstance(temperature, torch.Tensor) and temperature.shape not in ((), hidden.shape[:1]):
        raise ValueError(f"temperature {list(temperature.shape)} must be one number or [T={hidden.shape[0]}]")
    if not bool(torch.as_tensor(temperature > 0).all()):
        raise ValueError("temperature must be positive")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise ValueError(f"targets span {int(targets.min())}..{int(targets.max())}, vocabulary is 0..{vocab_size - 1}")


def _local_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    shard: _Shard,
    with_entropy: bool,
) -> torch.Tensor:
    """This shard's maximum m, sum of exp(z - m), sum of (z - m) exp(z - m), and target logit (0 where absent): [t, 4].

    A shard of padding alone reports (-inf, 0, 0, 0), which the merge gives no weight.
    """
    statistics = temperatures.new_zeros(hidden.shape[0], 4)
    if shard.num_rows == 0:
        statistics[:, 0] = -torch.inf
        return statistics
    logits = (hidden.to(weight.dtype) @ weight.T).div_(temperatures[:, None])
    rows, is_here = shard.locate(targets)
    statistics[:, 3] = torch.where(is_here, logits.gather(1, rows[:, None]).squeeze(1), 0.0)
    maximum = logits.amax(dim=1)
    shifted = logits.sub_(maximum[:, None])
    exponentials = shifted.exp() if with_entropy else shifted.exp_()
    statistics[:, 0] = maximum
    statistics[:, 1] = exponentials.sum(dim=1)
    if with_entropy:
        statistics[:, 2] = exponentials.mul_(shifted).sum(dim=1)
    return statistics


def _merge(statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges the shards' statistics [tp, T, 4] to maximum, sum of exponentials, weighted sum and target logit, [T]."""
    maxima, sums, weighted_sums, target_logits = statistics.unbind(dim=2)
    maximum = maxima.amax(dim=0)
    # A shard without real rows has -inf here, and -inf * 0 would be nan.
    shifts = torch.where(sums > 0, maxima - maximum, 0.0)
    factors = shifts.exp()
    return (
        maximum,
        (factors * sums).sum(dim=0),
        (factors * (weighted_sums + shifts * sums)).sum(dim=0),
        target_logits.sum(dim=0),
    )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperatures: torch.Tensor,
        shard: _Shard,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = hidden.shape[0]
        statistics = temperatures.new_empty(num_tokens, 4)
        head = weight[: shard.num_rows].to(temperatures.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, num_tokens, chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                statistics[chunk] = _local_statistics(
                    hidden[chunk], head, targets[chunk], temperatures[chunk], shard, with_entropy
                )
        shards = statistics[None]
        if shard.group is not None and num_tokens:
            shards = statistics.new_empty(dist.get_world_size(shard.group), num_tokens, 4)
            dist.all_gather_into_tensor(shards.flatten(0, 1), statistics, group=shard.group)
        maximum, total, weighted_sum, target_logits = _merge(shards)
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, targets, temperatures, maximum, log_total)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        entropies = log_total - weighted_sum / total if with_entropy else temperatures.new_empty(0)
        ctx.mark_non_differentiable(entropies)
        return (target_logits - maximum) - log_total, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, temperatures, maximum, log_total = ctx.saved_tensors
        shard: _Shard = ctx.shard
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight[: shard.num_rows].to(temperatures.dtype)
        grad_hidden = temperatures.new_zeros(hidden.shape) if needs_hidden else None
        grad_weight = temperatures.new_zeros(weight.shape) if needs_weight else None
        scales = grad_logprobs.to(temperatures.dtype) / temperatures
        num_tokens = hidden.shape[0] if shard.num_rows else 0
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, num_tokens, ctx.chunk_tokens):
                chunk = slice(start, start + ctx.chunk_tokens)
                inputs = hidden[chunk].to(head.dtype)
                logits = (inputs @ head.T).div_(temperatures[chunk, None])
                probabilities = logits.sub_(maximum[chunk, None]).sub_(log_total[chunk, None]).exp_()
                grad_logits = probabilities.mul_(-scales[chunk, None])
                rows, is_here = shard.locate(targets[chunk])
                grad_logits.scatter_add_(1, rows[:, None], (scales[chunk] * is_here)[:, None])
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_logits @ head
                if grad_weight is not None:
                    grad_weight[: shard.num_rows].addmm_(grad_logits.T, inputs)
        if grad_hidden is not None and shard.group is not None and hidden.shape[0]:
            dist.all_reduce(grad_hidden, group=shard.group)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            *(None,) * 5,
        )
