"""The torch backend: logits of a block of tokens, one tile of the vocabulary at a time.

The vocabulary is the outer loop: a tile of logits stays in cache, and the gradient of each tile's weights is one
product over all tokens of the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_prime.kernels.gemm import Gemm, GemmName, accumulator_dtype
from megatron_prime.kernels.shard import Merged

_TILE_BYTES = 8 * 2**20
_MAX_BLOCK_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens that are computed together, and the rows of the head on this rank."""

    hidden: torch.Tensor
    """[t, d]."""
    weight: torch.Tensor
    """[v, d], real rows only."""
    rows: torch.Tensor
    """int64 [t], the target's row in `weight`, -1 where another rank has it."""
    temperatures: torch.Tensor | None
    """[t] in the accumulator's type; None: all are 1."""


@dataclass(frozen=True, slots=True)
class TokenGradients:
    """Gradients that reach the logits of t tokens."""

    logprobs: torch.Tensor
    """[t]."""
    entropies: torch.Tensor | None
    """[t]; None: the entropy is no part of the loss."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Exponentials of one tile, so that the backward pass need not compute the logits again."""

    exponentials: torch.Tensor
    """[t, columns], of logit - maximum."""
    maximum: torch.Tensor
    """[t], of the tile."""


class TorchTiles:
    """Forward and backward of a block with torch operations, on any device and in any floating-point type.

    Args:
        gemm: float32 product on a CPU.
        workspace_bytes: bounds the tile.
    """

    def __init__(self, gemm: GemmName, workspace_bytes: int) -> None:
        self.gemm: GemmName = gemm
        self.tile_bytes = min(workspace_bytes, _TILE_BYTES)

    def kept_itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of a kept exponential, for inputs of a type."""
        return accumulator_dtype(dtype).itemsize

    def block_tokens(self, num_rows: int, itemsize: int) -> int:
        """Most tokens of a block."""
        return max(1, min(_MAX_BLOCK_TOKENS, self.tile_bytes // (itemsize * max(1, min(num_rows, 256)))))

    def _tiles(self, block: Block, itemsize: int) -> Iterator[slice]:
        num_rows = block.weight.shape[0]
        columns = max(1, self.tile_bytes // (itemsize * block.hidden.shape[0]))
        return (slice(start, min(start + columns, num_rows)) for start in range(0, num_rows, columns))

    def statistics(
        self, block: Block, dtype: torch.dtype, *, with_entropy: bool, keep: bool
    ) -> tuple[torch.Tensor, list[Kept] | None]:
        """This shard's statistics [t, 4] (see `merge_statistics`), and the tiles where they are to be kept."""
        num_tokens = block.hidden.shape[0]
        gemm = Gemm(self.gemm, block.hidden.dtype, block.hidden.device)
        hidden = gemm.prepare(block.hidden)
        maximum = hidden.new_full((num_tokens,), -torch.inf, dtype=dtype)
        total, weighted_sum, target_logits = (torch.zeros_like(maximum) for _ in range(3))
        kept: list[Kept] = []
        for tile in self._tiles(block, dtype.itemsize):
            logits = _scaled(gemm.logits(hidden, block.weight[tile]), block.temperatures)
            column, is_here = _columns(block.rows, tile)
            target_logits = torch.where(is_here, logits.gather(1, column).squeeze(1), target_logits)
            tile_maximum = logits.amax(dim=1)
            shifted = logits.sub_(tile_maximum[:, None])
            exponentials = shifted.exp() if with_entropy else shifted.exp_()
            if keep:
                kept.append(Kept(exponentials, tile_maximum))
            tile_total = exponentials.sum(dim=1)
            common = torch.maximum(maximum, tile_maximum)
            # Online softmax: rescale the running sums to the new common maximum. Before the first tile the maximum is
            # -inf with a total of 0, and -inf * 0 would be NaN.
            before = torch.where(total > 0, maximum - common, 0.0)
            here = tile_maximum - common
            if with_entropy:
                # sum (z - m) e^(z - m) for the entropy. Moving its maximum from m to m + s turns a term (z - m) into
                # (z - m - s), so each sum of exponentials enters with its shift.
                tile_weighted = shifted.mul_(exponentials).sum(dim=1)
                weighted_sum = (weighted_sum + before * total) * before.exp()
                weighted_sum = weighted_sum + (tile_weighted + here * tile_total) * here.exp()
            total = total * before.exp() + tile_total * here.exp()
            maximum = common
        return torch.stack((maximum, total, weighted_sum, target_logits), dim=1), kept if keep else None

    def gradients(
        self,
        block: Block,
        merged: Merged,
        upstream: TokenGradients,
        kept: list[Kept] | None,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
    ) -> None:
        """Adds the block's part to the gradients.

        With p the probabilities, g and h the gradients of log-prob and entropy H, and tau the temperature, a logit
        has the gradient (g (onehot - p) - h p (log p + H)) / tau.

        Args:
            block: as in `statistics`.
            merged: statistics of the block's tokens over all shards.
            upstream: gradients of the block's tokens.
            kept: what `statistics` kept.
            grad_hidden: [t, d], accumulator's type; this shard's part of the sum.
            grad_weight: [v, d], accumulator's type.
        """
        gemm = Gemm(self.gemm, block.hidden.dtype, block.hidden.device)
        hidden = gemm.prepare(block.hidden)
        scale, at_target = coefficients(merged, upstream, block.temperatures)
        for number, tile in enumerate(self._tiles(block, scale.dtype.itemsize)):
            if kept is not None:
                part = kept[number]
                shift = (part.maximum - merged.maximum) - merged.log_total
                grad_logits = part.exponentials * (scale * shift.exp())[:, None]
            else:
                logits = _scaled(gemm.logits(hidden, block.weight[tile]), block.temperatures)
                logs = logits.sub_(merged.maximum[:, None]).sub_(merged.log_total[:, None])
                grad_logits = _grad_logits(logs, scale, merged, upstream, block.temperatures)
            # The target's column is replaced as a whole: -g p + g would cancel to rounding where p is near 1.
            column, is_here = _columns(block.rows, tile)
            values = torch.where(is_here, at_target, grad_logits.gather(1, column).squeeze(1))
            grad_logits.scatter_(1, column, values[:, None])
            rounded = gemm.round(grad_logits)
            if grad_hidden is not None:
                gemm.accumulate(grad_hidden, rounded, block.weight[tile])
            if grad_weight is not None:
                gemm.accumulate(grad_weight[tile], rounded.T, block.hidden if gemm.rounds else hidden)


def _scaled(logits: torch.Tensor, temperatures: torch.Tensor | None) -> torch.Tensor:
    return logits if temperatures is None else logits.div_(temperatures[:, None])


def _columns(rows: torch.Tensor, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Column [t, 1] of each target in the tile (any column where it is elsewhere), and whether it is here [t]."""
    is_here = (rows >= tile.start) & (rows < tile.stop)
    return torch.where(is_here, rows - tile.start, 0)[:, None], is_here


def coefficients(
    merged: Merged, upstream: TokenGradients, temperatures: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factor of p where log p plays no part, and the whole gradient of the target's logit; each [t].

    1 - p of a confident target is computed as -expm1(log p): the difference 1 - p would be nothing but rounding.
    """
    g = upstream.logprobs
    scale, at_target = -g, g * -torch.expm1(merged.logprobs)
    if upstream.entropies is not None:
        h = upstream.entropies
        scale = scale - h * merged.entropies
        at_target = at_target - h * merged.logprobs.exp() * (merged.logprobs + merged.entropies)
    if temperatures is None:
        return scale, at_target
    return scale / temperatures, at_target / temperatures


def _grad_logits(
    logs: torch.Tensor,
    scale: torch.Tensor,
    merged: Merged,
    upstream: TokenGradients,
    temperatures: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the logits, but for the one-hot part, from log p [t, v], which is overwritten."""
    if upstream.entropies is None:
        return logs.exp_().mul_(scale[:, None])
    h = upstream.entropies if temperatures is None else upstream.entropies / temperatures
    # p log p is 0 where p underflows, because log p comes from logits and stays finite.
    factor = logs.mul(-h[:, None]).add_(scale[:, None])
    return logs.exp_().mul_(factor)
