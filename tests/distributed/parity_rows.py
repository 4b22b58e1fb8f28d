"""Rows of a batch, and their log-probs by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_prime.mcore.packing import ResponseTokens, TokenRows

TEMPERATURE = 0.7


def make_rows() -> TokenRows:
    generator = torch.Generator().manual_seed(3)
    num_rows = 7
    lengths = torch.randint(1, 12, (num_rows,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(2, 131, mask.shape, generator=generator)
    prompts = [
        torch.randint(2, 131, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 20, (num_rows,), generator=generator)
    ]
    return TokenRows(prompt_token_ids=tuple(map(tuple, prompts)), response_ids=ids * mask, mask=mask)


def expected_logprobs(folder: Path, rows: TokenRows) -> torch.Tensor:
    """Row by row through transformers, log-softmax in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = torch.zeros(rows.mask.shape, dtype=torch.float64)
    for row, prompt in enumerate(rows.prompt_token_ids):
        response = rows.response_ids[row][rows.mask[row]]
        sequence = torch.cat((torch.tensor(prompt), response))
        with torch.no_grad():
            logits = model(sequence[None]).logits[0].double() / TEMPERATURE
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])
        result[row, : len(response)] = picked[:, 0]
    return result


@dataclass(frozen=True)
class ScaledLoss:
    """The sum of log-probs times a factor."""

    scale: float
    whole_sequences: bool = False
    with_entropy: bool = False

    def __call__(
        self, logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        return logprobs.sum() * self.scale, {"mean": logprobs.mean()}
