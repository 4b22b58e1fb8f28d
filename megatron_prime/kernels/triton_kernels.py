"""The Triton backend: logits stay in registers, statistics of vocabulary splits are merged afterwards.

Import this module only where Triton runs (`backends.choose_backend`). Loop bounds are compile-time constants and every
column beyond the shard is masked before anything is compared with it. Tile shapes are fixed: tuning at run time would
change the order of sums between ranks and after a resume.
"""

# Triton's own types do not describe the language inside a kernel, nor how a kernel is called.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_prime.kernels.gemm import Gemm
from megatron_prime.kernels.shard import Merged, combine_statistics
from megatron_prime.kernels.tiles import Block, TokenGradients, coefficients

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if Triton runs kernels as Python on CPU tensors (TRITON_INTERPRET=1), for tests."""

_MAX_BLOCK_TOKENS = 16384
_SLAB_BYTES = 64 * 2**20
_GROUP = 16
"""Token tiles that go through all splits together, so that their hidden states stay in the L2 cache."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """Sizes that the kernels are compiled for."""

    tokens: int
    columns: int
    depth: int
    """Channels of one step along the hidden size."""
    tiles_per_split: int
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> TileShape:
        """Fits the registers and shared memory of compute capability 8.0 and up."""
        if INTERPRETED:
            return cls(tokens=16, columns=16, depth=16, tiles_per_split=2)
        return cls(tokens=128, columns=128, depth=64 if dtype == torch.bfloat16 else 32, tiles_per_split=8)


@dataclass(frozen=True, slots=True)
class KeptSplits:
    """Exponentials of a block, each tile's relative to the tile's own maximum."""

    exponentials: torch.Tensor
    """[t, v], type of the hidden states."""
    maxima: torch.Tensor
    """float32 [tiles, t]."""


@triton.jit
def _tile_logits(
    hidden,
    weight,
    temperatures,
    tokens,
    columns,
    num_tokens,
    num_rows,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """float32 logits [TOKENS, COLUMNS], divided by the temperature; rubbish outside of the shard."""
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    token_inside = tokens[:, None] < num_tokens
    column_inside = columns[None, :] < num_rows
    for step in range(tl.cdiv(SIZE, DEPTH)):
        depth = step * DEPTH + tl.arange(0, DEPTH)
        left_mask, right_mask = token_inside, column_inside
        if SIZE % DEPTH != 0:
            left_mask = left_mask & (depth[None, :] < SIZE)
            right_mask = right_mask & (depth[:, None] < SIZE)
        left = tl.load(hidden + tokens[:, None].to(tl.int64) * SIZE + depth[None, :], mask=left_mask, other=0.0)
        right = tl.load(weight + columns[None, :].to(tl.int64) * SIZE + depth[:, None], mask=right_mask, other=0.0)
        if UPCAST:
            # The interpreter multiplies bfloat16 bit patterns.
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    if temperatures is not None:
        total = total / tl.load(temperatures + tokens, mask=tokens < num_tokens, other=1.0)[:, None]
    return total


@triton.jit
def _statistics_kernel(
    hidden,
    weight,
    rows,
    temperatures,
    partials,
    exponentials,
    maxima,
    num_tokens,
    num_rows,
    num_splits,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Statistics of TOKENS tokens over one split; consecutive programs share a split's TILES weight tiles in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * num_splits) * GROUP
    width = tl.minimum(tl.cdiv(num_tokens, TOKENS) - first, GROUP)
    split = program % (GROUP * num_splits) // width
    tokens = (first + program % (GROUP * num_splits) % width) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < num_tokens
    target = tl.load(rows + tokens, mask=inside, other=-1)
    maximum = tl.full((TOKENS,), -float("inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    target_logit = tl.zeros((TOKENS,), tl.float32)
    for tile in range(TILES):
        columns = (split * TILES + tile) * COLUMNS + tl.arange(0, COLUMNS)
        logits = _tile_logits(
            hidden,
            weight,
            temperatures,
            tokens,
            columns,
            num_tokens,
            num_rows,
            SIZE,
            TOKENS,
            COLUMNS,
            DEPTH,
            UPCAST,
        )
        valid = columns[None, :] < num_rows
        target_logit += tl.sum(tl.where(valid & (columns[None, :] == target[:, None]), logits, 0.0), axis=1)
        tile_maximum = tl.max(tl.where(valid, logits, -float("inf")), axis=1)
        common = tl.maximum(maximum, tile_maximum)
        # A tile beyond the shard's last row may have -inf in both maxima: -inf - -inf would be NaN.
        shifted = tl.where(valid, logits - common[:, None], 0.0)
        powers = tl.where(valid, tl.exp(shifted), 0.0)
        before = tl.where(total > 0.0, maximum - common, 0.0)
        if ENTROPY:
            weighted = (weighted + before * total) * tl.exp(before) + tl.sum(shifted * powers, axis=1)
        total = total * tl.exp(before) + tl.sum(powers, axis=1)
        maximum = common
        if exponentials is not None:
            own = tl.exp(logits - tile_maximum[:, None]).to(exponentials.dtype.element_ty)
            place = exponentials + tokens[:, None].to(tl.int64) * num_rows + columns[None, :]
            tl.store(place, own, mask=inside[:, None] & valid)
            tl.store(maxima + (split * TILES + tile).to(tl.int64) * num_tokens + tokens, tile_maximum, mask=inside)
    result = partials + (split.to(tl.int64) * num_tokens + tokens) * 4
    tl.store(result, maximum, mask=inside)
    tl.store(result + 1, total, mask=inside)
    tl.store(result + 2, weighted, mask=inside)
    tl.store(result + 3, target_logit, mask=inside)


@triton.jit
def _grad_logits_kernel(
    hidden,
    weight,
    rows,
    temperatures,
    maximum,
    log_total,
    scale,
    at_target,
    entropy_scale,
    exponentials,
    maxima,
    grad_logits,
    num_tokens,
    num_rows,
    first_column,
    num_columns,
    num_token_tiles,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of the logits of one tile of a slab, rounded once; grid: token tiles x tiles of the slab."""
    program = tl.program_id(0)
    tokens = program % num_token_tiles * TOKENS + tl.arange(0, TOKENS)
    tile = program // num_token_tiles
    columns = first_column + tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = tokens < num_tokens
    mask = inside[:, None] & (columns[None, :] < num_rows)
    offset = tl.load(maximum + tokens, mask=inside, other=0.0)
    log_sum = tl.load(log_total + tokens, mask=inside, other=0.0)
    factor = tl.load(scale + tokens, mask=inside, other=0.0)
    if exponentials is not None:
        place = exponentials + tokens[:, None].to(tl.int64) * num_rows + columns[None, :]
        powers = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        number = first_column // COLUMNS + tile
        own = tl.load(maxima + number.to(tl.int64) * num_tokens + tokens, mask=inside, other=0.0)
        result = powers * (factor * tl.exp((own - offset) - log_sum))[:, None]
    else:
        logits = _tile_logits(
            hidden,
            weight,
            temperatures,
            tokens,
            columns,
            num_tokens,
            num_rows,
            SIZE,
            TOKENS,
            COLUMNS,
            DEPTH,
            UPCAST,
        )
        logs = (logits - offset[:, None]) - log_sum[:, None]
        if entropy_scale is not None:
            slope = tl.load(entropy_scale + tokens, mask=inside, other=0.0)
            result = tl.exp(logs) * (factor[:, None] - slope[:, None] * logs)
        else:
            result = tl.exp(logs) * factor[:, None]
    target = tl.load(rows + tokens, mask=inside, other=-1)
    whole = tl.load(at_target + tokens, mask=inside, other=0.0)
    result = tl.where(columns[None, :] == target[:, None], whole[:, None], result)
    place = grad_logits + tokens[:, None].to(tl.int64) * num_columns + (columns - first_column)[None, :]
    tl.store(place, result.to(grad_logits.dtype.element_ty), mask=mask)


class TritonKernels:
    """Forward and backward of a block of tokens; `TorchTiles` documents the methods.

    Args:
        workspace_bytes: bounds the slab of logit gradients.
    """

    def __init__(self, workspace_bytes: int) -> None:
        self.slab_bytes = min(workspace_bytes, _SLAB_BYTES)

    def kept_itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of a kept exponential."""
        return dtype.itemsize

    def block_tokens(self, num_rows: int, itemsize: int) -> int:
        """Most tokens of a block."""
        return _MAX_BLOCK_TOKENS

    def statistics(
        self, block: Block, dtype: torch.dtype, *, with_entropy: bool, keep: bool
    ) -> tuple[torch.Tensor, KeptSplits | None]:
        """This shard's statistics [t, 4], and the exponentials where they are to be kept."""
        hidden, weight = block.hidden.contiguous(), block.weight.contiguous()
        (num_tokens, size), num_rows = hidden.shape, weight.shape[0]
        shape = TileShape.for_dtype(hidden.dtype)
        num_token_tiles = triton.cdiv(num_tokens, shape.tokens)
        num_splits = triton.cdiv(num_rows, shape.columns * shape.tiles_per_split)
        partials = torch.empty(num_splits, num_tokens, 4, dtype=torch.float32, device=hidden.device)
        kept = None
        if keep:
            kept = KeptSplits(
                torch.empty(num_tokens, num_rows, dtype=hidden.dtype, device=hidden.device),
                partials.new_empty(num_splits * shape.tiles_per_split, num_tokens),
            )
        _statistics_kernel[(num_token_tiles * num_splits,)](  # pyright: ignore[reportIndexIssue]
            hidden,
            weight,
            block.rows,
            None if block.temperatures is None else block.temperatures.contiguous(),
            partials,
            None if kept is None else kept.exponentials,
            None if kept is None else kept.maxima,
            num_tokens,
            num_rows,
            num_splits,
            TILES=shape.tiles_per_split,
            GROUP=_GROUP,
            ENTROPY=with_entropy,
            **_constants(shape, size),
        )
        return torch.stack(combine_statistics(partials), dim=1), kept

    def gradients(
        self,
        block: Block,
        merged: Merged,
        upstream: TokenGradients,
        kept: KeptSplits | None,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
    ) -> None:
        """Adds the block's part to the gradients."""
        hidden, weight = block.hidden.contiguous(), block.weight.contiguous()
        gemm = Gemm("mm", hidden.dtype, hidden.device)
        for columns, grad_logits in self._slabs(block, hidden, weight, merged, upstream, kept):
            if grad_hidden is not None:
                gemm.accumulate(grad_hidden, grad_logits, weight[columns])
            if grad_weight is not None:
                gemm.accumulate(grad_weight[columns], grad_logits.T, hidden)

    def _slabs(
        self,
        block: Block,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        merged: Merged,
        upstream: TokenGradients,
        kept: KeptSplits | None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Columns of the vocabulary and the gradient of their logits [t, columns], in memory that is used again."""
        (num_tokens, size), num_rows = hidden.shape, weight.shape[0]
        shape = TileShape.for_dtype(hidden.dtype)
        num_token_tiles = triton.cdiv(num_tokens, shape.tokens)
        scale, at_target = coefficients(merged, upstream, block.temperatures)
        slope = upstream.entropies
        if slope is not None:
            slope = (slope if block.temperatures is None else slope / block.temperatures).float().contiguous()
        wanted = self.slab_bytes // (hidden.dtype.itemsize * num_tokens)
        step = max(shape.columns, wanted // shape.columns * shape.columns)
        memory = hidden.new_empty(num_tokens * min(step, num_rows))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            slab = memory[: num_tokens * (stop - start)].view(num_tokens, stop - start)
            grid = (num_token_tiles * triton.cdiv(stop - start, shape.columns),)
            _grad_logits_kernel[grid](  # pyright: ignore[reportIndexIssue]
                hidden,
                weight,
                block.rows,
                None if block.temperatures is None else block.temperatures.contiguous(),
                merged.maximum.contiguous(),
                merged.log_total.contiguous(),
                scale.float().contiguous(),
                at_target.float().contiguous(),
                slope,
                None if kept is None else kept.exponentials,
                None if kept is None else kept.maxima,
                slab,
                num_tokens,
                num_rows,
                start,
                stop - start,
                num_token_tiles,
                **_constants(shape, size),
            )
            yield slice(start, stop), slab


def _constants(shape: TileShape, size: int) -> dict[str, Any]:
    """Compile-time arguments that both kernels take."""
    constants: dict[str, Any] = {
        "SIZE": size,
        "TOKENS": shape.tokens,
        "COLUMNS": shape.columns,
        "DEPTH": shape.depth,
        "UPCAST": INTERPRETED,
    }
    return constants if INTERPRETED else constants | {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
