"""The head's losses take chunks of response tokens: what the parts of a mini-batch add up to, beside plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from slow_reference import cross_entropy, mean, to_rows

from megatron_prime.config.schema import PolicySection, PrmSection
from megatron_prime.mcore.losses import PolicyTokenLoss, PrmTokenLoss, SftTokenLoss, TokenLoss
from megatron_prime.mcore.packing import ResponseTokens
from megatron_prime.sockets import resolve

LENGTHS = (3, 1, 4, 2)
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
TOKENS = ResponseTokens(rows=MASK.nonzero()[:, 0], columns=MASK.nonzero()[:, 1])


def values(seed: int, low: float = -2.0, high: float = 0.0) -> torch.Tensor:
    """float64 [B, R], 0 on padding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(MASK.shape, generator=generator, dtype=torch.float64) * (high - low) + low) * MASK


def parts_of(loss: TokenLoss, logprobs: torch.Tensor, cuts: list[int]) -> tuple[float, dict[str, float], torch.Tensor]:
    """Loss and metrics summed over chunks of the tokens, and the gradient [B, R] of the log-probs."""
    flat = TOKENS.take(logprobs).clone().requires_grad_()
    entropy = torch.arange(len(flat), dtype=torch.float64) / 10
    total, metrics = torch.zeros((), dtype=torch.float64), dict[str, float]()
    for start, stop in zip([0, *cuts], [*cuts, len(flat)], strict=True):
        chunk = slice(start, stop)
        value, found = loss(flat[chunk], entropy[chunk] if loss.with_entropy else None, TOKENS.part(chunk))
        total = total + value
        for key, metric in found.items():
            joined = max if key.startswith("max_") else float.__add__
            metrics[key] = joined(metrics.get(key, 0.0), float(metric))
    total.backward()
    assert flat.grad is not None
    return (
        float(total.detach()),
        metrics,
        torch.zeros_like(logprobs).index_put((TOKENS.rows, TOKENS.columns), flat.grad),
    )


@pytest.mark.parametrize("cuts", [[], [1, 3, 8]])
def test_sft_is_the_mean_over_the_tokens(cuts: list[int]) -> None:
    logprobs = values(1)
    loss, metrics, gradient = parts_of(SftTokenLoss(num_tokens=sum(LENGTHS)), logprobs, cuts)
    assert loss == pytest.approx(-mean([v for row in to_rows(logprobs, MASK) for v in row]))
    assert metrics["entropy"] == pytest.approx(mean([n / 10 for n in range(10)]))
    assert torch.allclose(gradient, -MASK.double() / 10)


@pytest.mark.parametrize("cuts", [[], [2, 5], [1, 3, 8]])
def test_ppo_is_clipped_token_by_token_with_the_weights_of_the_mini_batch(cuts: list[int]) -> None:
    section = PolicySection(clip_ratio_low=0.2, clip_ratio_high=0.3)
    logprobs, old, advantages, weights = values(1), values(2), values(3, -1, 1), values(4, 0.01, 0.2)
    weights[1] = 0.0  # a row of another mini-batch
    loss = PolicyTokenLoss(
        section=section,
        surrogate=resolve("policy.loss", "ppo_clip"),
        weights=weights,
        advantages=advantages,
        old_logprobs=old,
        reference_logprobs=None,
    )
    found, metrics, gradient = parts_of(loss, logprobs, cuts)
    expected, clipped, divergence, slopes = 0.0, 0.0, 0.0, torch.zeros_like(logprobs)
    for row, column in MASK.nonzero().tolist():
        weight, advantage = float(weights[row, column]), float(advantages[row, column])
        log_ratio = float(logprobs[row, column] - old[row, column])
        ratio = math.exp(log_ratio)
        cut = min(max(ratio, 0.8), 1.3)
        is_cut = cut * advantage < ratio * advantage
        expected -= weight * (cut if is_cut else ratio) * advantage
        clipped += weight * is_cut
        divergence += weight * (ratio - 1 - log_ratio)
        slopes[row, column] = 0.0 if is_cut else -weight * ratio * advantage
    assert found == pytest.approx(expected)
    assert 0 < metrics["clip_fraction"] == pytest.approx(clipped)
    assert metrics["kl"] == pytest.approx(divergence)
    assert torch.allclose(gradient, slopes)


def test_without_old_logprobs_the_ratio_is_one_and_has_a_gradient() -> None:
    weights, advantages = MASK / 10, values(3, -1, 1)
    loss = PolicyTokenLoss(
        section=PolicySection(),
        surrogate=resolve("policy.loss", "ppo_clip"),
        weights=weights,
        advantages=advantages,
        old_logprobs=None,
        reference_logprobs=None,
    )
    found, metrics, gradient = parts_of(loss, values(1), [4])
    assert found == pytest.approx(-float((weights * advantages).sum()))
    assert (metrics["kl"], metrics["max_ratio"]) == (0.0, 1.0)
    assert torch.allclose(gradient, -weights * advantages)


def prm_loss(name: str, reference: torch.Tensor, **changes: object) -> PrmTokenLoss:
    arguments: dict[str, object] = {
        "section": PrmSection(beta=0.5, aggregation="sum"),
        "loss": resolve("prm.loss", name),
        "reference_logprobs": reference,
        "mask": MASK,
        "labels": torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),
        "group_accuracy": torch.full((4,), 0.5, dtype=torch.float64),
        "group_size": torch.full((4,), 2.0, dtype=torch.float64),
        "opponents": None,
        "num_responses": 4,
    }
    return PrmTokenLoss(**(arguments | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("cuts", [[], [3, 4], [4]], ids=["whole", "three chunks", "two chunks"])
def test_the_prm_learns_the_outcome_of_whole_responses(cuts: list[int]) -> None:
    logprobs, reference = values(1), values(2)
    loss = prm_loss("cross_entropy", reference)
    assert loss.whole_sequences and not loss.with_entropy
    found, metrics, gradient = parts_of(loss, logprobs, cuts)
    logits = [0.5 * sum(row) for row in to_rows(logprobs - reference, MASK)]
    labels = [1.0, 0.0, 0.0, 1.0]
    assert found == pytest.approx(cross_entropy(logits, labels))
    right = mean([float((z > 0) == (y > 0.5)) for z, y in zip(logits, labels, strict=True)])
    assert metrics["train_accuracy"] == pytest.approx(right)
    slopes = [0.5 * (1 / (1 + math.exp(-z)) - y) / 4 for z, y in zip(logits, labels, strict=True)]
    assert torch.allclose(gradient, torch.tensor(slopes, dtype=torch.float64)[:, None] * MASK)


def test_a_pairwise_prm_loss_needs_opponents() -> None:
    with pytest.raises(ValueError, match="pairwise: needs the logits of opponents"):
        parts_of(prm_loss("pairwise", values(2)), values(1), [])
