"""Blame and prefix values by hand and against loops over plain Python lists."""

import math

import torch

from megatron_prime.algorithm.advantage import leave_one_out, whiten
from megatron_prime.algorithm.baselines import dr_grpo_process
from megatron_prime.algorithm.credit import (
    evidence_advantages,
    prefix_advantages,
    prefix_values,
    scale_by_rms,
    spare_right_steps,
)


def test_blame_changes_the_size_of_what_is_negative_and_no_sign():
    advantages = torch.tensor([[0.5, 0.5, 0.0], [-0.5, -0.5, -0.5]])
    blame = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.25]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert spare_right_steps(advantages, blame, mask).tolist() == [[0.5, 0.5, 0.0], [0.0, -0.5, -0.125]]
    assert spare_right_steps(advantages, blame, mask, threshold=0.5).tolist() == [[0.5, 0.5, 0.0], [0.0, -0.5, 0.0]]
    everywhere = torch.ones_like(blame)
    assert torch.equal(spare_right_steps(advantages, everywhere, mask), advantages)


def test_evidence_replaces_the_advantage_of_wrong_answers_only():
    advantages = torch.tensor([[0.75, 0.75, 0.0], [-0.25, -0.25, -0.25], [0.0, 0.0, 0.0]])
    evidence = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.5], [0.0, -0.5, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    is_wrong = torch.tensor([False, True, True])

    def credit(weight: float) -> list[list[float]]:
        got = evidence_advantages(advantages, evidence, is_wrong, mask, reward=0.5, penalty=1.0, weight=weight)
        return got.tolist()

    assert credit(0.5) == [[0.75, 0.75, 0.0], [0.25, -0.5, 0.125], [0.0, -0.25, 0.0]]
    assert credit(0.0) == [[0.75, 0.75, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_scaling_by_rms_keeps_zeros_where_whitening_does_not():
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    spared = torch.tensor([[2.0, 2.0], [0.0, 0.0], [0.0, 77.0]])
    scaled = scale_by_rms(spared, mask)
    rms = math.sqrt(8 / 5)
    torch.testing.assert_close(scaled, torch.tensor([[2 / rms, 2 / rms], [0.0, 0.0], [0.0, 0.0]]))
    assert (whiten(spared, mask)[1] < 0).all()
    assert not scale_by_rms(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)).any()


def test_prefix_values_by_hand():
    ids = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 7], [4, 6, 7]])
    mask = torch.ones(4, 3, dtype=torch.bool)
    outcomes, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64)
    values = prefix_values(ids, mask, outcomes, groups)
    torch.testing.assert_close(
        values, torch.tensor([[1 / 3, 0.5, 1.0], [1 / 3, 0.5, 0.0], [1 / 3, 0.0, 0.0], [1.0, 1.0, 1.0]])
    )
    advantages = prefix_advantages(ids, mask, outcomes, groups)
    torch.testing.assert_close(advantages[0], torch.tensor([1 / 3 - 0.5, 0.5 - 1 / 3, 0.5]))
    torch.testing.assert_close(advantages[3], torch.tensor([0.5, 0.0, 0.0]))


def test_prefix_values_agree_with_a_loop_over_random_answers():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])[torch.randperm(8, generator=generator)]
    lengths = torch.randint(1, 6, (8,), generator=generator).tolist()
    ids = torch.randint(0, 2, (8, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    outcomes = torch.rand(8, generator=generator, dtype=torch.float64)
    values = prefix_values(ids, mask, outcomes, groups)
    for i in range(8):
        for t in range(5):
            prefix = ids[i, : t + 1].tolist()
            through = [
                outcomes[j].item()
                for j in range(8)
                if groups[j] == groups[i] and lengths[j] > t and ids[j, : t + 1].tolist() == prefix
            ]
            expected = sum(through) / len(through) if t < lengths[i] else 0.0
            assert math.isclose(values[i, t].item(), expected, abs_tol=1e-12)


def test_prefix_advantages_of_distinct_answers_add_up_to_the_outcome_above_the_groups_mean():
    ids = torch.tensor([[5, 6, 1], [5, 7, 1], [8, 6, 1], [8, 6, 2]])
    mask = torch.ones(4, 3, dtype=torch.bool)
    outcomes, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0])
    total = prefix_advantages(ids, mask, outcomes, groups).sum(dim=1)
    everywhere = torch.ones(4, 1, dtype=torch.bool)
    torch.testing.assert_close(total, dr_grpo_process(outcomes[:, None], everywhere, groups)[:, 0])
    torch.testing.assert_close(total * 4 / 3, leave_one_out(outcomes, groups))
