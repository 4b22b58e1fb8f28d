"""Group and batch baselines, constant loss weights and the overlong penalty against loops over plain floats."""

import math

import pytest
import slow_reference as slow
import torch

from megatron_prime.algorithm.advantage import leave_one_out
from megatron_prime.algorithm.baselines import (
    constant_loss_weights,
    dr_grpo_process,
    overlong_penalty,
    reinforce_pp_process,
)


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rewards with rubbish on the padding, mask, group_index): groups of 1 to 4 in mixed order, an empty response."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])[torch.randperm(10, generator=generator)]
    lengths = torch.randint(1, 8, (10,), generator=generator)
    lengths[int((groups == 3).nonzero()[0])] = 0
    mask = torch.arange(8) < lengths[:, None]
    rewards = 3.0 + torch.randn(10, 8, generator=generator, dtype=torch.float64)
    return torch.where(mask, rewards, 77.0), mask, groups


def slow_minus_group_mean(rows: list[list[float]], groups: list[int]) -> list[list[float]]:
    result = []
    for i, row in enumerate(rows):
        means = [slow.mean(rows[j]) for j in slow.members(groups, i) if rows[j]]
        result.append([r - slow.mean(means) for r in row])
    return result


def slow_batch_standardised(rows: list[list[float]]) -> list[list[float]]:
    means = [slow.mean(row) for row in rows if row]
    return [[(r - slow.mean(means)) / slow.sample_std(means) for r in row] for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_dr_grpo_subtracts_the_mean_of_the_group(seed):
    rewards, mask, groups = random_batch(seed)
    rows = slow.to_rows(rewards, mask)
    expected = slow.to_padded(slow_minus_group_mean(rows, groups.tolist()), mask.shape[1])
    torch.testing.assert_close(dr_grpo_process(rewards, mask, groups), expected)


def test_dr_grpo_is_a_scaled_leave_one_out_for_outcomes():
    outcomes, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    got = dr_grpo_process(outcomes[:, None], torch.ones(5, 1, dtype=torch.bool), groups).squeeze(1)
    torch.testing.assert_close(got, leave_one_out(outcomes, groups) * torch.tensor([2 / 3] * 3 + [1 / 2] * 2))


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_pp_standardises_over_the_batch(seed):
    rewards, mask, groups = random_batch(seed)
    rows = slow.to_rows(rewards, mask)
    expected = slow.to_padded(slow_batch_standardised(rows), mask.shape[1])
    torch.testing.assert_close(reinforce_pp_process(rewards, mask, groups, baseline="batch"), expected)
    centred = slow_minus_group_mean(rows, groups.tolist())
    expected = slow.to_padded(slow_batch_standardised(centred), mask.shape[1])
    torch.testing.assert_close(reinforce_pp_process(rewards, mask, groups, baseline="group"), expected)


def test_equal_rewards_give_exactly_nothing():
    mask, groups = torch.tensor([[True, True], [True, False], [True, True]]), torch.tensor([0, 0, 1])
    rewards = torch.full((3, 2), 0.1)
    assert not dr_grpo_process(rewards, mask, groups).any()
    assert not reinforce_pp_process(rewards, mask, groups, baseline="batch").any()
    assert not reinforce_pp_process(rewards, mask, groups, baseline="group").any()
    with pytest.raises(ValueError, match="neither"):
        reinforce_pp_process(rewards, mask, groups, baseline="strict")  # type: ignore[arg-type]


def test_constant_weights_do_not_depend_on_the_lengths_around_a_token():
    short = constant_loss_weights(torch.tensor([[True, False, False], [True, True, False]]), max_length=4)
    long = constant_loss_weights(torch.tensor([[True, True, True], [True, True, True]]), max_length=4)
    assert short[0, 0] == long[0, 0] == 1 / 8
    assert float(short.sum()) == 3 / 8 and float(long.sum()) == 6 / 8
    assert float(constant_loss_weights(torch.zeros(2, 3, dtype=torch.bool), max_length=4).sum()) == 0.0


def test_overlong_penalty_falls_over_the_buffer():
    penalty = overlong_penalty(torch.tensor([0, 80, 85, 90, 100, 120]), max_length=100, buffer=20)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(torch.tensor([1]), max_length=100, buffer=buffer)
    assert math.isclose(float(overlong_penalty(torch.tensor([3]), max_length=4, buffer=4)[0]), -0.75)
