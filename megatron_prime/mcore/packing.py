"""Cuts the whole batch into this rank's micro-batches (sharding by tokens, packing) and maps results back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_prime.batch import RolloutBatch, SftExample
from megatron_prime.config.schema import ModelSection, ParallelSection
from megatron_prime.mcore.context import ContextPart, context_part

_FIELDS = {"input_ids": np.int64, "position_ids": np.int64, "predicts": np.bool_}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """Prompts with answers, whole batch, on the CPU: what any of the models can score or train on."""

    prompt_token_ids: tuple[tuple[int, ...], ...]
    """Length B."""
    response_ids: torch.Tensor
    """int64 [B, R], right-padded."""
    mask: torch.Tensor
    """bool [B, R], true on response tokens."""

    @classmethod
    def from_rollout(cls, batch: RolloutBatch) -> TokenRows:
        """The rows of a rollout batch."""
        return cls(prompt_token_ids=batch.prompt_token_ids, response_ids=batch.response_ids, mask=batch.mask)

    @classmethod
    def from_examples(cls, examples: Sequence[SftExample]) -> TokenRows:
        """The rows of supervised examples."""
        width = max(len(e.response_token_ids) for e in examples)
        response_ids = torch.zeros(len(examples), width, dtype=torch.int64)
        mask = torch.zeros(len(examples), width, dtype=torch.bool)
        for row, example in enumerate(examples):
            length = len(example.response_token_ids)
            response_ids[row, :length] = torch.tensor(example.response_token_ids)
            mask[row, :length] = True
        return cls(prompt_token_ids=tuple(e.prompt_token_ids for e in examples), response_ids=response_ids, mask=mask)

    def input_lengths(self) -> list[int]:
        """Tokens that each row feeds to a model: all but the last one, which is only a target."""
        responses = self.mask.sum(dim=1).tolist()
        return [len(p) + int(n) - 1 for p, n in zip(self.prompt_token_ids, responses, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseTokens:
    """n response tokens of a batch, flat, row after row."""

    rows: torch.Tensor
    """int64 [n], row of the whole batch that each token belongs to."""
    columns: torch.Tensor
    """int64 [n], its response position."""

    def part(self, tokens: slice) -> ResponseTokens:
        """Some of the tokens."""
        return ResponseTokens(rows=self.rows[tokens], columns=self.columns[tokens])

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """Flat [n] view of a whole-batch [B, R] tensor."""
        return whole[self.rows, self.columns]

    def unique_rows(self) -> torch.Tensor:
        """The rows of the whole batch among these tokens, in order of first appearance."""
        return torch.unique_consecutive(self.rows)

    def response_lengths(self) -> list[int]:
        """Tokens of each of `unique_rows`."""
        return torch.unique_consecutive(self.rows, return_counts=True)[1].tolist()

    def to_rows(self, flat: torch.Tensor, width: int) -> torch.Tensor:
        """Differentiable inverse of `take` for these tokens: [n] to [num_rows, width], 0 elsewhere."""
        unique, inverse = torch.unique_consecutive(self.rows, return_inverse=True)
        return flat.new_zeros(len(unique), width).index_put((inverse, self.columns), flat)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch(ResponseTokens):
    """One forward pass, and the response tokens that it predicts."""

    input_ids: torch.Tensor
    """int64 [1, T] packed, or [b, s]; under context parallelism this rank's tokens of them."""
    position_ids: torch.Tensor
    predicts: torch.Tensor
    """bool, shaped as `input_ids`: positions whose next token is a response token."""
    targets: torch.Tensor
    """int64 [n], the response tokens."""
    lengths: tuple[int, ...]
    """Input tokens of each sequence, all ranks together; with `packed` they sum to T (padding is a sequence of its
    own, or the end of one under context parallelism)."""
    packed: bool
    context: ContextPart | None = None


def shard_rows(lengths: Sequence[int], rows: Sequence[int], num_shards: int) -> list[list[int]]:
    """Assigns rows to data-parallel shards, longest first onto the lightest shard; the same on every rank.

    Args:
        lengths: tokens of every row of the whole batch.
        rows: the rows to assign.

    Returns:
        Row numbers per shard, each sorted by falling length (equal lengths by row number).
    """
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    loads = [0] * num_shards
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        lightest = min(range(num_shards), key=lambda s: (loads[s], len(shards[s]), s))
        shards[lightest].append(row)
        loads[lightest] += lengths[row]
    return shards


def cut_micro_batches(
    lengths: Sequence[int], rows: Sequence[int], *, micro_batch_size: int | None, micro_batch_tokens: int | None
) -> list[list[int]]:
    """Cuts one shard's rows (sorted by length) into micro-batches.

    Exactly one limit is set: sequences, or tokens (a longer sequence goes alone).
    """
    cuts: list[list[int]] = []
    tokens = 0
    for row in rows:
        full = not cuts or (
            len(cuts[-1]) >= micro_batch_size
            if micro_batch_size is not None
            else micro_batch_tokens is not None and tokens + lengths[row] > micro_batch_tokens
        )
        if full:
            cuts.append([])
            tokens = 0
        cuts[-1].append(row)
        tokens += lengths[row]
    return cuts


def sequence_multiple(model: ModelSection, parallel: ParallelSection) -> int:
    """Returns the number that each context-parallel rank's sequence length must be a multiple of.

    Sequence parallelism divides the length evenly, and FP8 products of Transformer Engine and cuBLAS take 16 rows at a
    time (weight gradients have the tokens as inner dimension).
    """
    num_shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return num_shares * (16 if model.fp8 is not None else 1)


def build_micro_batch(
    batch: TokenRows,
    rows: Sequence[int],
    *,
    packed: bool,
    multiple_of: int,
    context_rank: int = 0,
    context_size: int = 1,
) -> MicroBatch:
    """Lays out rows for one forward pass.

    Args:
        batch: the whole batch.
        rows: its rows to take; without any the micro-batch is padding.
        packed: back to back, else right-padded.
        multiple_of: each rank's sequence dimension is padded to a multiple of this (`sequence_multiple`).
        context_rank: this process's part of every sequence; its response tokens are those of its share of the rows.
        context_size: context-parallel ranks, among which every sequence is cut.
    """
    counts = batch.mask[list(rows)].sum(dim=1)
    responses = [ids[:n] for ids, n in zip(batch.response_ids[list(rows)].tolist(), counts.tolist(), strict=True)]
    prompts = [batch.prompt_token_ids[row] for row in rows]
    used = [len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)]
    # Context parallelism cuts each sequence into two chunks per rank.
    cut = 2 * context_size if context_size > 1 else 1
    lengths = [_rounded_up(length, cut) for length in used]
    width = sum(lengths) if packed else max(lengths, default=0)
    step = math.lcm(cut, context_size * multiple_of)
    padding = -width % step if rows else step
    shape = (1, width + padding) if packed else (max(len(rows), 1), width + padding)
    arrays = {name: np.zeros(shape, dtype) for name, dtype in _FIELDS.items()}
    start = 0
    for index, (prompt, response, length) in enumerate(zip(prompts, responses, used, strict=True)):
        line, offset = (0, start) if packed else (index, 0)
        arrays["input_ids"][line, offset : offset + length] = (*prompt, *response)[:-1]
        arrays["position_ids"][line, offset : offset + lengths[index]] = range(lengths[index])
        # Position t predicts token t + 1: the prompt's last position predicts the first response token, and the
        # last response token is only a target, never an input.
        arrays["predicts"][line, offset + len(prompt) - 1 : offset + length] = True
        start += lengths[index]
    # Padding gets ordinary positions, so that it computes finite values; nothing reads them.
    if not packed:
        arrays["position_ids"][:] = range(shape[1])
    elif padding:
        arrays["position_ids"][0, width:] = range(padding)
    if padding and (packed or not rows):
        lengths.append(padding)
    fields = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mine, context = torch.ones(len(rows), dtype=torch.bool), None
    if context_size > 1:
        owners = _owners(counts.tolist(), context_size)
        mine = owners == context_rank
        line_lengths = lengths if packed else [shape[1]]
        context = context_part(
            fields["predicts"], owners.repeat_interleave(counts), line_lengths, context_rank, context_size
        )
        fields = {name: field[:, context.places] for name, field in fields.items()}
    taken = torch.tensor(list(rows), dtype=torch.int64)[mine]
    mask = batch.mask[taken]
    return MicroBatch(
        **fields,
        targets=batch.response_ids[taken][mask],
        lengths=tuple(lengths),
        packed=packed,
        context=context,
        rows=taken.repeat_interleave(counts[mine]),
        columns=mask.nonzero()[:, 1],
    )


def _rounded_up(length: int, multiple_of: int) -> int:
    return length + -length % multiple_of


def _owners(num_tokens: Sequence[int], size: int) -> torch.Tensor:
    """Assigns each answer to the rank that puts it through the head, int64 [rows], balanced by tokens."""
    owners = torch.zeros(len(num_tokens), dtype=torch.int64)
    for rank, rows in enumerate(shard_rows(num_tokens, range(len(num_tokens)), size)):
        owners[rows] = rank
    return owners


def split_minibatches(group_index: torch.Tensor, num_minibatches: int, seed: int) -> list[list[int]]:
    """Rows of each mini-batch: whole groups in a seeded order, dealt out evenly.

    Args:
        group_index: int64 [B], group of each row.
        num_minibatches: at most the number of groups.
        seed: of the order.
    """
    num_groups = int(group_index.max()) + 1
    if num_groups < num_minibatches:
        num_minibatches = num_groups
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed)).tolist()
    rows_of: list[list[int]] = [[] for _ in range(num_groups)]
    for row, group in enumerate(group_index.tolist()):
        rows_of[group].append(row)
    return [[row for group in order[i::num_minibatches] for row in rows_of[group]] for i in range(num_minibatches)]
