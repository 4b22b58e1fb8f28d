"""Implicit rewards and PRM losses: hand-computed, against loops, and cut into micro-batches."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import slow_reference as slow
import torch
from hypothesis import given, settings

from megatron_prime.algorithm import (
    cross_entropy_loss,
    implicit_rewards,
    opponent_logits,
    outcome_labels,
    pairwise_loss,
    sequence_logits,
)


def random_batch(seed: int, num_responses: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(prm_logprobs, reference_logprobs, mask) with rubbish on the padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (num_responses,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    prm, reference = (-torch.rand(mask.shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return torch.where(mask, prm, torch.nan), torch.where(mask, reference, torch.inf), mask


def test_rewards_and_logits_by_hand():
    prm = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.25, -1.0]])
    reference = torch.tensor([[-2.0, -1.0, -9.0], [-0.5, -0.75, -3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert implicit_rewards(prm, reference, mask, beta=0.5).tolist() == [[0.5, -0.5, 0.0], [0.0, 0.25, 1.0]]
    logits = {
        kind: sequence_logits(prm, reference, mask, beta=0.5, aggregation=kind).tolist() for kind in ("sum", "mean")
    }
    assert logits["sum"] == [0.0, 1.25]
    assert logits["mean"] == pytest.approx([0.0, 1.25 / 3])


def test_response_without_tokens_has_logit_zero():
    prm, mask = torch.full((1, 2), -1.0), torch.zeros(1, 2, dtype=torch.bool)
    for kind in ("sum", "mean"):
        assert sequence_logits(prm, 2 * prm, mask, beta=1.0, aggregation=kind).tolist() == [0.0]


def test_partial_credit_is_wrong_unless_labels_are_soft():
    outcomes = torch.tensor([0.0, 0.5, 0.9999, 1.0])
    assert outcome_labels(outcomes, soft_labels=False).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert outcome_labels(outcomes, soft_labels=True) is outcomes


def test_cross_entropy_by_hand_and_in_saturation():
    logits = torch.tensor([0.0, math.log(3.0)])
    expected = (math.log(2.0) - math.log(0.25)) / 2
    assert float(cross_entropy_loss(logits, torch.tensor([1.0, 0.0]), num_responses=2)) == pytest.approx(expected)
    extreme = torch.tensor([500.0], requires_grad=True)
    loss = cross_entropy_loss(extreme, torch.tensor([0.0]), num_responses=1)
    loss.backward()
    assert loss.item() == 500.0 and extreme.grad is not None and float(extreme.grad) == 1.0


def test_pairwise_by_hand():
    logits = torch.tensor([1.0, 0.0, 2.0, 5.0], requires_grad=True)
    labels, group_index = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([4, 4, 4, 9])
    opponents = opponent_logits(logits, labels, group_index)
    assert opponents[:3].tolist() == [1.0, 1.0, 1.0] and opponents[3].isnan() and not opponents.requires_grad
    loss = pairwise_loss(logits, labels, opponents, num_responses=4)
    expected = (math.log(2.0) + math.log1p(math.exp(-1.0)) + math.log1p(math.exp(1.0))) / 4
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    right_below_wrong = 1 / (1 + math.exp(-1.0))
    expected_gradient = torch.tensor([-0.5, 1 - right_below_wrong, right_below_wrong, 0.0]) / 4
    torch.testing.assert_close(logits.grad, expected_gradient)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("seed", range(4))
def test_losses_match_the_slow_reference(seed, aggregation):
    prm, reference, mask = random_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    outcomes = torch.randint(0, 2, (7,), generator=generator).double()
    group_index = torch.randint(0, 3, (7,), generator=generator)
    rewards = slow.implicit_rewards(slow.to_rows(prm, mask), slow.to_rows(reference, mask), 0.3)
    fast_rewards = implicit_rewards(prm, reference, mask, beta=0.3)
    torch.testing.assert_close(fast_rewards, slow.to_padded(rewards, mask.shape[1]), rtol=1e-12, atol=1e-12)
    expected = [math.fsum(row) / (len(row) if aggregation == "mean" else 1) for row in rewards]
    logits = sequence_logits(prm, reference, mask, beta=0.3, aggregation=aggregation)
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    entropy = float(cross_entropy_loss(logits, outcomes, num_responses=7))
    assert entropy == pytest.approx(slow.cross_entropy(expected, outcomes.tolist()), rel=1e-10)
    opponents = opponent_logits(logits, outcomes, group_index)
    pairwise = float(pairwise_loss(logits, outcomes, opponents, num_responses=7))
    assert pairwise == pytest.approx(slow.pairwise(expected, outcomes.tolist(), group_index.tolist()), rel=1e-10)


def test_padding_gets_no_gradient_and_breaks_none():
    prm, reference, mask = random_batch(0)
    prm.requires_grad_()
    logits = sequence_logits(prm, reference, mask, beta=0.05, aggregation="mean")
    cross_entropy_loss(logits, torch.ones(7), num_responses=7).backward()
    assert prm.grad is not None and prm.grad[~mask].eq(0).all() and prm.grad[mask].lt(0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=7, max_size=7), st.sampled_from(["ce", "pairwise"]))
def test_micro_batches_add_up(seed, assignment, kind):
    """Any cut of the mini-batch (micro-batches, ranks) gives the same loss and gradient."""
    prm, reference, mask = random_batch(seed)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    group_index = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    with torch.no_grad():
        snapshot = sequence_logits(prm, reference, mask, beta=0.5, aggregation="sum")
    opponents = opponent_logits(snapshot, labels, group_index)

    def loss_of(rows: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        logits = sequence_logits(parameter[rows], reference[rows], mask[rows], beta=0.5, aggregation="sum")
        if kind == "ce":
            return cross_entropy_loss(logits, labels[rows], num_responses=7)
        return pairwise_loss(logits, labels[rows], opponents[rows], num_responses=7)

    whole = prm.clone().requires_grad_()
    loss_of(torch.arange(7), whole).backward()
    cut = prm.clone().requires_grad_()
    parts = [torch.tensor([i for i in range(7) if assignment[i] == part], dtype=torch.int64) for part in range(4)]
    for rows in parts:
        loss_of(rows, cut).backward()
    torch.testing.assert_close(cut.grad, whole.grad, rtol=1e-12, atol=1e-12)
