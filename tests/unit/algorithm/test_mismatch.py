"""Difference between the engine's and the trainer's log-probs, by hand and against slow loops."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.algorithm.mismatch import importance_weights, measure_mismatch
from megatron_prime.algorithm.policy_loss import PolicyTokens, loss_weights, policy_loss
from megatron_prime.config.schema import PolicySection

MASK = torch.tensor([[True, True, False], [True, True, True]])
ROLLOUT = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -0.25, -3.0]])
TRAIN = torch.tensor([[-0.5, -2.5, -7.0], [-2.5, -0.25, -4.0]])


def test_by_hand() -> None:
    found = measure_mismatch(TRAIN, ROLLOUT, MASK)
    differences = [0.5, -0.5, -2.0, 0.0, -1.0]
    assert found.mean == pytest.approx(sum(map(abs, differences)) / 5)
    assert found.max == pytest.approx(2.0)
    assert found.kl == pytest.approx(sum(math.exp(d) - 1 - d for d in differences) / 5)


def test_equal_distributions_have_no_mismatch() -> None:
    found = measure_mismatch(TRAIN, TRAIN, MASK)
    assert (found.mean, found.max, found.kl) == (0.0, 0.0, 0.0)


def test_truncated_weights_by_hand() -> None:
    weights = importance_weights(TRAIN, ROLLOUT, MASK, cap=1.2, max_sequence_ratio=None)
    expected = [[1.2, math.exp(-0.5), 1.0], [math.exp(-2.0), 1.0, math.exp(-1.0)]]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_the_sequence_mask_takes_whole_responses() -> None:
    # Means of the differences: 0 and -1.
    weights = importance_weights(TRAIN, ROLLOUT, MASK, cap=None, max_sequence_ratio=2.5)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    weights = importance_weights(TRAIN, ROLLOUT, MASK, cap=None, max_sequence_ratio=2.8)
    torch.testing.assert_close(weights, torch.ones(2, 3))


def test_off_means_one() -> None:
    torch.testing.assert_close(
        importance_weights(TRAIN, ROLLOUT, MASK, cap=None, max_sequence_ratio=None), torch.ones(2, 3)
    )


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_weighted_advantages_are_a_weighted_loss(dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    train, rollout, now, advantages = (torch.randn(4, 5, generator=generator) for _ in range(4))
    mask = torch.rand(4, 5, generator=generator) < 0.7
    section = PolicySection(clip_ratio_high=0.3, dual_clip=dual_clip)

    def loss_of(logprobs, old, advantages, weights) -> float:
        tokens = PolicyTokens(logprobs=logprobs, old_logprobs=old, advantages=advantages, weights=weights)
        return float(policy_loss(tokens, section)[0])

    factors = importance_weights(train, rollout, mask, cap=1.5, max_sequence_ratio=4.0)
    loss = loss_of(now, train, advantages * factors, loss_weights(mask, "token"))
    total, num_tokens = 0.0, int(mask.sum())
    for row in range(4):
        for column in range(5):
            if not mask[row, column]:
                continue
            one = (slice(row, row + 1), slice(column, column + 1))
            value = loss_of(now[one], train[one], advantages[one], torch.ones(1, 1))
            total += value * float(factors[one]) / num_tokens
    assert loss == pytest.approx(total, rel=1e-5)


def test_huge_differences_stay_finite() -> None:
    weights = importance_weights(
        torch.tensor([[0.0]]),
        torch.tensor([[-1e4]]),
        torch.ones(1, 1, dtype=torch.bool),
        cap=2.0,
        max_sequence_ratio=None,
    )
    assert weights.item() == 2.0
    assert math.isfinite(measure_mismatch(torch.zeros(1), torch.full((1,), -1e4), torch.ones(1, dtype=torch.bool)).kl)
