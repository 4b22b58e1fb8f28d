"""Rows for packing, and what must become of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from megatron_prime.mcore.packing import (
    TokenRows,
)

LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8)
"""(prompt, response) tokens of each row."""


def make_rows(lengths: list[tuple[int, int]]) -> TokenRows:
    """Every token of the batch is another number, so that no mix-up can hide."""
    numbers = iter(range(1, 10_000))
    width = max(response for _, response in lengths)
    prompts, response_ids = [], torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(lengths):
        prompts.append(tuple(next(numbers) for _ in range(prompt)))
        response_ids[row, :response] = torch.tensor([next(numbers) for _ in range(response)])
        mask[row, :response] = True
    return TokenRows(prompt_token_ids=tuple(prompts), response_ids=response_ids, mask=mask)


def slow_cells(rows: TokenRows, row: int) -> list[tuple[int, int, int, bool]]:
    """(input, position, next token, whether the next token is a response token) of a row's inputs."""
    prompt = list(rows.prompt_token_ids[row])
    response = [int(t) for t, real in zip(rows.response_ids[row], rows.mask[row], strict=True) if real]
    sequence = prompt + response
    predicts = [i + 1 >= len(prompt) for i in range(len(sequence) - 1)]
    return [(sequence[i], i, sequence[i + 1] if p else 0, p) for i, p in enumerate(predicts)]
