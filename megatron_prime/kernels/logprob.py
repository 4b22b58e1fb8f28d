"""Log-probs of given tokens straight from hidden states, for any loss: forward, and backward by computing again.

Every formula works on logits minus their maximum and accumulates in float32 (float64 for float64 inputs): the PRM's
reward is a difference of two log-probs, which bfloat16 logits would drown in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_prime.kernels.contract import EntropyMode, HeadOptions, LogprobResult, check_arguments
from megatron_prime.kernels.passes import Head, Tokens, WeightGradient, token_temperatures
from megatron_prime.kernels.shard import Merged, Shard, merge_statistics
from megatron_prime.kernels.tiles import TokenGradients


def fused_linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float | torch.Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_shards: Sequence[int] | None = None,
    entropy: EntropyMode = "none",
    accumulate_main_grad: bool = False,
    options: HeadOptions | None = None,
) -> LogprobResult:
    """Computes log softmax(hidden @ weight.T / temperature)[target] per token without the logits of all tokens.

    Differentiable once in `hidden` and `weight`, with any upstream gradient per token. Four matrix products of
    2 T d V operations in all, three where the exponentials of all tokens fit `options.workspace_bytes`. Under tensor
    parallelism all ranks of the group call it with the same targets and upstream gradients; the gradient of `hidden`
    comes back summed over the group.

    Args:
        hidden: [T, d]; any strides, T may be 0. With `sequence_shards`: this rank's rows of it.
        weight: [V_local, d], this rank's rows of the head; same dtype as `hidden`.
        targets: integers [T], global token ids.
        vocab_size: real size of the whole vocabulary; rows from there on are padding and get no probability.
        temperature: divides the logits; one number or [T]. No gradient.
        tp_group: ranks that share the head, in order of their rows; None where this rank holds all of it.
        sequence_shards: rows of `hidden` that each rank of the group holds (sequence parallelism), summing to T;
            None: every rank holds all of them.
        entropy: `metric` also returns the entropy without gradient, `grad` with.
        accumulate_main_grad: add the gradient of `weight` to its float32 `main_grad`, as Megatron's own layers do.
        options: how to compute it.

    Returns:
        Log-probs and entropy, bitwise identical on all ranks of the group.

    Raises:
        ValueError: shapes or dtypes that do not belong together, a temperature that is not positive, or a target
            outside of the vocabulary.
    """
    options = options or HeadOptions()
    check_arguments(
        hidden,
        weight,
        targets,
        temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_shards=sequence_shards,
        accumulate_main_grad=accumulate_main_grad,
        options=options,
    )
    shard = Shard.of(weight, vocab_size, tp_group)
    logprobs, entropies = _LinearLogprob.apply(
        hidden, weight, targets, temperature, shard, sequence_shards, entropy, accumulate_main_grad, options
    )
    return LogprobResult(logprobs=logprobs, entropy=None if entropy == "none" else entropies)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float | torch.Tensor,
        shard: Shard,
        sequence_shards: Sequence[int] | None,
        entropy: EntropyMode,
        accumulate_main_grad: bool,
        options: HeadOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.parameter, ctx.grad_dtype = weight, hidden.dtype
        if sequence_shards is not None:
            hidden = shard.gather_sequence(hidden, sequence_shards)
        head = Head(weight, shard, options)
        rows = shard.local_rows(targets)
        temperatures = token_temperatures(temperature, len(rows), head.dtype, hidden.device)
        statistics, ctx.kept = head.statistics(
            Tokens(hidden, rows, temperatures),
            with_entropy=entropy != "none",
            # The gradient of the entropy needs logarithms, which an exponential that underflows has lost.
            keep=any(ctx.needs_input_grad) and entropy != "grad" and head.fits(len(rows)),
        )
        merged = merge_statistics(shard.gather_statistics(statistics))
        ctx.save_for_backward(
            hidden, weight, rows, temperatures, merged.maximum, merged.log_total, merged.logprobs, merged.entropies
        )
        ctx.shard, ctx.sequence_shards, ctx.options = shard, sequence_shards, options
        ctx.accumulate_main_grad, ctx.entropy = accumulate_main_grad, entropy
        ctx.set_materialize_grads(False)
        if entropy != "grad":
            ctx.mark_non_differentiable(merged.entropies)
        return merged.logprobs, merged.entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, rows, temperatures, *statistics = ctx.saved_tensors
        merged = Merged(*statistics)
        head = Head(weight, ctx.shard, ctx.options)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=head.dtype) if needs_hidden else None
        grad_weight = (
            WeightGradient(ctx.parameter, into_main_grad=ctx.accumulate_main_grad, dtype=head.dtype)
            if needs_weight
            else None
        )
        head.gradients(
            Tokens(hidden, rows, temperatures),
            merged,
            TokenGradients(
                torch.zeros_like(merged.logprobs) if grad_logprobs is None else grad_logprobs,
                grad_entropies if ctx.entropy == "grad" else None,
            ),
            ctx.kept,
            grad_hidden,
            None if grad_weight is None else grad_weight.total,
        )
        if grad_hidden is not None:
            grad_hidden = ctx.shard.reduce_hidden(grad_hidden, ctx.sequence_shards).to(ctx.grad_dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.hand_over(weight.dtype), *(None,) * 7
