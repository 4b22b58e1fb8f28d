"""The prefix-value loss, its baseline and its weights against loops over plain floats."""

import math

import pytest
import slow_reference as slow
import torch

from megatron_prime.algorithm.prefix_loss import difficulty_baseline, label_weights, prefix, prefix_cross_entropy_loss
from megatron_prime.algorithm.prm_loss import PrmResponses
from megatron_prime.config.schema import PrmSection


def random_batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])[torch.randperm(9, generator=generator)]
    labels = torch.randint(0, 2, (9,), generator=generator).to(torch.float64)
    lengths = torch.randint(1, 7, (9,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    rewards = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    return torch.where(mask, rewards, 44.0).requires_grad_(), mask, labels, groups


@pytest.mark.parametrize("seed", range(5))
def test_loss_agrees_with_a_loop(seed):
    rewards, mask, labels, groups = random_batch(seed)
    margin, baseline, weights = 0.7, difficulty_baseline(labels, groups), label_weights(labels, groups)
    total = 0.0
    for i, row in enumerate(slow.to_rows(rewards.detach(), mask)):
        mine = [labels[j].item() for j in slow.members(groups.tolist(), i)]
        right, wrong = sum(mine), len(mine) - sum(mine)
        v0 = math.log((right + 0.5) / (wrong + 0.5))
        weight = len(mine) / (2 * (right if labels[i] else wrong)) if right and wrong else 0.0
        part = 0.0
        for t in range(len(row)):
            v = sum(row[: t + 1]) / (t + 1) + v0
            part -= math.log(slow.sigmoid(v - margin)) if labels[i] else math.log(slow.sigmoid(-v - margin))
        total += weight * part / len(row)
    loss = prefix_cross_entropy_loss(
        rewards, mask, labels, num_responses=9, margin=margin, baseline=baseline, weights=weights
    )
    assert loss.item() == pytest.approx(total / 9)
    loss.backward()
    assert rewards.grad is not None and not rewards.grad[~mask].any()


def test_weights_balance_right_and_wrong_answers_of_each_group():
    labels, groups = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert label_weights(labels, groups).tolist() == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3, 0.0, 0.0])


def test_parts_add_up_to_the_mini_batch():
    rewards, mask, labels, _ = random_batch(9)
    whole = prefix_cross_entropy_loss(rewards, mask, labels, num_responses=9)
    parts = [
        prefix_cross_entropy_loss(rewards[s], mask[s], labels[s], num_responses=9) for s in (slice(0, 2), slice(2, 9))
    ]
    assert sum(parts).item() == pytest.approx(whole.item())


def test_early_tokens_learn_more_than_late_ones():
    rewards = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    prefix_cross_entropy_loss(rewards, torch.ones(1, 4, dtype=torch.bool), torch.ones(1), num_responses=1).backward()
    assert rewards.grad is not None
    # Token s is in the prefixes s .. L, each a mean of t tokens: -1/2 * (1/L) * sum_{t >= s} 1/t.
    expected = [-0.5 / 4 * sum(1 / t for t in range(s, 5)) for s in range(1, 5)]
    assert rewards.grad[0].tolist() == pytest.approx(expected)


def test_the_loss_of_the_configuration_is_the_one_with_baseline_and_weights_of_the_whole_batch():
    generator = torch.Generator().manual_seed(4)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 4])[:, None]
    labels, group_index = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    prm, reference = (torch.where(mask, -torch.rand(6, 5, generator=generator), 0.0) for _ in range(2))
    size = torch.tensor([3.0, 3.0, 3.0, 2.0, 2.0, 1.0])
    mean = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5, 0.0])
    section = PrmSection(beta=10.0)

    def loss_of(rows: list[int]) -> torch.Tensor:
        return prefix(
            PrmResponses(
                prm_logprobs=prm[rows],
                reference_logprobs=reference[rows],
                mask=mask[rows],
                labels=labels[rows],
                group_accuracy=mean[rows],
                group_size=size[rows],
                opponents=None,
                num_responses=6,
                section=section,
            )
        )

    expected = prefix_cross_entropy_loss(
        10.0 * (prm - reference),
        mask,
        labels,
        num_responses=6,
        baseline=difficulty_baseline(labels, group_index),
        weights=label_weights(labels, group_index),
    )
    torch.testing.assert_close(loss_of([0, 1, 2, 3, 4, 5]), expected)
    torch.testing.assert_close(loss_of([0, 4]) + loss_of([1, 2, 3, 5]), expected)
