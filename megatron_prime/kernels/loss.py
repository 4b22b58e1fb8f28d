"""A loss evaluated inside the chunks of tokens, so that forward and backward need three matrix products, not four.

While the exponentials of a chunk are still in memory its log-probs are complete, its loss can be asked for the
gradient of every log-prob, and the gradients of hidden states and head follow without computing the logits again.
Chunks end where sequences end if the loss wants whole ones, which is all that PPO and the PRM's loss need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_prime.errors import TrainingError
from megatron_prime.kernels.contract import ChunkLoss, EntropyMode, HeadOptions, LossResult, check_arguments
from megatron_prime.kernels.passes import Head, Tokens, WeightGradient, token_temperatures
from megatron_prime.kernels.shard import Merged, Shard, merge_statistics
from megatron_prime.kernels.tiles import TokenGradients


def fused_linear_logprob_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss: ChunkLoss,
    *,
    vocab_size: int,
    sequence_lengths: Sequence[int] | None = None,
    temperature: float | torch.Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_shards: Sequence[int] | None = None,
    entropy: EntropyMode = "none",
    accumulate_main_grad: bool = False,
    options: HeadOptions | None = None,
) -> LossResult:
    """Evaluates a loss that is a sum over chunks of tokens, and its gradients in the same pass.

    Three matrix products of 2 T d V operations in all. A sequence that must stay whole and whose exponentials exceed
    `options.workspace_bytes` is computed twice instead (four products), as is everything with `entropy="grad"`.

    Args:
        hidden: [T, d], as in `fused_linear_logprob`; so are the arguments not named here.
        weight: [V_local, d].
        targets: integers [T].
        loss: called for consecutive chunks that cover all tokens, with log-probs and entropy of the chunk. Under
            tensor parallelism every rank calls it, and every rank must compute the same.
        sequence_lengths: tokens of each sequence, summing to T; chunks then hold whole sequences. None: the loss
            needs no more than single tokens, and a chunk may end anywhere.
        entropy: what the loss is given besides log-probs; with `grad` it may depend on the entropy.
        accumulate_main_grad: add the gradient of `weight` to its `main_grad`, and do so in this call: the upstream
            gradient of the loss must then be 1.

    Returns:
        The summed loss, with log-probs and entropies of all tokens.

    Raises:
        ValueError: as `fused_linear_logprob`, and sequence lengths that do not sum to T.
        TrainingError: from the backward pass, where `accumulate_main_grad` is set and the upstream gradient is not 1.
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
    if sequence_lengths is not None and sum(sequence_lengths) != len(targets):
        raise ValueError(f"sequence_lengths sum to {sum(sequence_lengths)}, targets are {len(targets)}")
    shard = Shard.of(weight, vocab_size, tp_group)
    total, logprobs, entropies = _LinearLogprobLoss.apply(
        hidden,
        weight,
        targets,
        loss,
        temperature,
        shard,
        sequence_lengths,
        sequence_shards,
        entropy,
        accumulate_main_grad and torch.is_grad_enabled(),
        options,
        torch.is_grad_enabled(),
    )
    return LossResult(loss=total, logprobs=logprobs, entropy=None if entropy == "none" else entropies)


def cut_chunks(num_tokens: int, max_tokens: int, sequence_lengths: Sequence[int] | None) -> Iterator[slice]:
    """Yields consecutive slices of at most `max_tokens` tokens, of whole sequences if lengths are given.

    A longer sequence has a chunk of its own.
    """
    start = stop = 0
    for length in sequence_lengths if sequence_lengths is not None else [1] * num_tokens:
        if stop > start and stop + length - start > max_tokens:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


class _LinearLogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        loss: ChunkLoss,
        temperature: float | torch.Tensor,
        shard: Shard,
        sequence_lengths: Sequence[int] | None,
        sequence_shards: Sequence[int] | None,
        entropy: EntropyMode,
        accumulate_main_grad: bool,
        options: HeadOptions,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = hidden.dtype
        if sequence_shards is not None:
            hidden = shard.gather_sequence(hidden, sequence_shards)
        head = Head(weight, shard, options)
        rows = shard.local_rows(targets)
        tokens = Tokens(hidden, rows, token_temperatures(temperature, len(rows), head.dtype, hidden.device))
        needs_hidden, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=head.dtype) if needs_hidden else None
        ctx.grad_weight = (
            WeightGradient(weight, into_main_grad=accumulate_main_grad, dtype=head.dtype) if needs_weight else None
        )
        losses = torch.zeros((), dtype=head.dtype, device=hidden.device)
        logprobs, entropies = (losses.new_empty(len(rows)) for _ in range(2))
        # Every rank cuts the same chunks: `token_bytes` counts padding rows, so it is equal on all of them. Each chunk
        # needs one all-gather of its statistics, and a rank with other chunks would hang the group.
        for chunk in cut_chunks(len(rows), max(1, head.workspace_bytes // head.token_bytes), sequence_lengths):
            part = tokens.take(chunk)
            statistics, kept = head.statistics(
                part,
                with_entropy=entropy != "none",
                keep=(needs_hidden or needs_weight) and entropy != "grad" and head.fits(chunk.stop - chunk.start),
            )
            merged = merge_statistics(shard.gather_statistics(statistics))
            value, upstream = _evaluate(loss, merged, chunk, entropy)
            losses += value
            logprobs[chunk], entropies[chunk] = merged.logprobs, merged.entropies
            head.gradients(
                part,
                merged,
                upstream,
                kept,
                None if grad_hidden is None else grad_hidden[chunk],
                None if ctx.grad_weight is None else ctx.grad_weight.total,
            )
        if grad_hidden is not None:
            grad_hidden = shard.reduce_hidden(grad_hidden, sequence_shards).to(dtype)
        ctx.save_for_backward(grad_hidden)
        ctx.weight_dtype, ctx.in_main_grad = weight.dtype, accumulate_main_grad and needs_weight
        ctx.mark_non_differentiable(logprobs, entropies)
        return losses, logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.in_main_grad and float(upstream) != 1.0:
            raise TrainingError(
                f"the gradient of a loss that reaches the head is {float(upstream)}, and the head's own gradient is in "
                "main_grad already, computed for 1; scale the loss inside the chunks or switch accumulate_main_grad off"
            )
        (grad_hidden,) = ctx.saved_tensors
        grad_weight = None if ctx.grad_weight is None else ctx.grad_weight.hand_over(ctx.weight_dtype)
        if not ctx.in_main_grad:
            grad_hidden = None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight * upstream.to(grad_weight.dtype)
        return grad_hidden, grad_weight, *(None,) * 10


def _evaluate(
    loss: ChunkLoss, merged: Merged, chunk: slice, entropy: EntropyMode
) -> tuple[torch.Tensor, TokenGradients]:
    """Returns the chunk's loss and its gradients with respect to log-probs and entropies."""
    # The loss sees fresh leaves: autograd inside this forward pass stops at the log-probs, and the head's own formula
    # (`TorchTiles.gradients`) takes over from there.
    logprobs, entropies = merged.logprobs.detach().requires_grad_(), merged.entropies.detach()
    leaves = [logprobs, entropies.requires_grad_()] if entropy == "grad" else [logprobs]
    with torch.enable_grad():
        value = loss(logprobs, None if entropy == "none" else entropies, chunk)
    found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    return value.detach(), TokenGradients(grads[0], grads[1] if entropy == "grad" else None)
