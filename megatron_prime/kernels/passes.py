"""Runs both passes over all tokens of a call, block by block, on either backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prime.kernels.backends import make_backend
from megatron_prime.kernels.contract import HeadOptions
from megatron_prime.kernels.gemm import accumulator_dtype
from megatron_prime.kernels.shard import Merged, Shard
from megatron_prime.kernels.tiles import Block, TokenGradients


@dataclass(frozen=True, slots=True)
class Tokens:
    """Inputs of the passes for T tokens."""

    hidden: torch.Tensor
    """[T, d]."""
    rows: torch.Tensor
    """int64 [T], as in `Block`."""
    temperatures: torch.Tensor | None
    """[T], as in `Block`."""

    def take(self, part: slice) -> Tokens:
        """Some of the tokens."""
        return Tokens(
            self.hidden[part], self.rows[part], None if self.temperatures is None else self.temperatures[part]
        )


class Head:
    """The real rows of a head on this rank with the backend that computes them.

    Args:
        weight: [V_local, d], detached.
        shard: where its rows belong.
        options: of the op.
    """

    def __init__(self, weight: torch.Tensor, shard: Shard, options: HeadOptions) -> None:
        self.weight = weight[: shard.num_rows]
        self.shard = shard
        self.dtype = accumulator_dtype(weight.dtype)
        self.workspace_bytes = options.workspace_bytes
        self.backend = make_backend(options, weight.dtype, weight.device)
        # Counts padding rows too, so that it is equal on all ranks: they must cut their tokens in the same way.
        self.token_bytes = weight.shape[0] * self.backend.kept_itemsize(weight.dtype)

    def _blocks(self, tokens: Tokens) -> Iterator[tuple[slice, Block]]:
        num_tokens = tokens.hidden.shape[0] if self.shard.num_rows else 0
        step = self.backend.block_tokens(self.shard.num_rows, self.dtype.itemsize)
        for start in range(0, num_tokens, step):
            part = slice(start, min(start + step, num_tokens))
            taken = tokens.take(part)
            yield part, Block(taken.hidden, self.weight, taken.rows, taken.temperatures)

    def fits(self, num_tokens: int) -> bool:
        """Returns whether the exponentials of `num_tokens` tokens fit the workspace."""
        return num_tokens * self.token_bytes <= self.workspace_bytes

    def statistics(self, tokens: Tokens, *, with_entropy: bool, keep: bool) -> tuple[torch.Tensor, list[Any]]:
        """This shard's statistics [T, 4], and per block what the backend kept."""
        statistics = torch.zeros(tokens.hidden.shape[0], 4, dtype=self.dtype, device=tokens.hidden.device)
        statistics[:, 0] = -torch.inf
        kept = []
        with torch.autocast(tokens.hidden.device.type, enabled=False):
            for part, block in self._blocks(tokens):
                statistics[part], tiles = self.backend.statistics(
                    block, self.dtype, with_entropy=with_entropy, keep=keep
                )
                kept.append(tiles)
        return statistics, kept

    def gradients(
        self,
        tokens: Tokens,
        merged: Merged,
        upstream: TokenGradients,
        kept: list[Any],
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
    ) -> None:
        """Adds all tokens' gradients to [T, d] and [V_local, d], both in the accumulator's type."""
        if grad_hidden is None and grad_weight is None:
            return
        with torch.autocast(tokens.hidden.device.type, enabled=False):
            for number, (part, block) in enumerate(self._blocks(tokens)):
                entropies = upstream.entropies
                self.backend.gradients(
                    block,
                    merged.take(part),
                    TokenGradients(upstream.logprobs[part], None if entropies is None else entropies[part]),
                    kept[number] if kept else None,
                    None if grad_hidden is None else grad_hidden[part],
                    None if grad_weight is None else grad_weight[: self.shard.num_rows],
                )


def token_temperatures(
    temperature: float | torch.Tensor, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """[T] in the accumulator's type, None where dividing would change nothing."""
    if not isinstance(temperature, torch.Tensor) and temperature == 1.0:
        return None
    return torch.as_tensor(temperature, dtype=dtype, device=device).detach().expand(num_tokens)


class WeightGradient:
    """Accumulates the gradient of the head and hands it to autograd.

    Args:
        weight: [V_local, d], the parameter itself.
        into_main_grad: add to Megatron's float32 `main_grad`.
        dtype: accumulator's type.
    """

    def __init__(self, weight: torch.Tensor, *, into_main_grad: bool, dtype: torch.dtype) -> None:
        self.parameter: Any = weight if into_main_grad else None
        self.total: torch.Tensor = (
            self.parameter.main_grad if into_main_grad else weight.new_zeros(weight.shape, dtype=dtype)
        )

    def hand_over(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the value that the autograd function must return for the weight.

        Megatron's data-parallel hook runs when a parameter's `grad` is set, and ignores its content once
        `grad_added_to_main_grad` is true, which its own fused linear layers promise by the same means. The embedding
        of a tied head (`zero_out_wgrad`) sets `grad` itself, with content that counts.
        """
        if self.parameter is None:
            return self.total.to(dtype)
        if getattr(self.parameter, "zero_out_wgrad", False):
            return None
        self.parameter.grad_added_to_main_grad = True
        return torch.empty_like(self.parameter)
