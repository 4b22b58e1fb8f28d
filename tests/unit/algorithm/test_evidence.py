"""AUC, the gate that it feeds, and step scores."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import slow_reference as slow
import torch
from hypothesis import given, settings

from megatron_prime.algorithm import auc, auc_gate, grouped_auc, step_scores
from megatron_prime.batch import StepSpan


def test_auc_by_hand():
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert auc(torch.tensor([4.0, 1.0, 3.0, 2.0]), labels) == 1.0
    assert auc(torch.tensor([1.0, 4.0, 2.0, 3.0]), labels) == 0.0
    assert auc(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 0.75
    assert auc(torch.zeros(4), labels) == 0.5
    assert auc(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels.bool()) == 0.75
    assert math.isnan(auc(torch.tensor([1.0, 2.0]), torch.ones(2)))
    assert math.isnan(auc(torch.zeros(0), torch.zeros(0)))


def test_knowing_only_which_prompts_are_hard_is_worth_nothing():
    """Scores that follow the prompt alone order pairs across prompts, and none within."""
    group_index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    scores = torch.where(group_index == 0, 1.0, -1.0)
    assert auc(scores, labels) > 0.7
    assert grouped_auc(scores, labels, group_index) == (0.5, 6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=1, max_size=25))
def test_matches_counting_pairs(items):
    scores, labels, groups = (list(column) for column in zip(*items, strict=True))
    labels = [float(label) for label in labels]
    tensors = torch.tensor(scores).float(), torch.tensor(labels)
    expected, _ = slow.auc_pairs(scores, labels, [0] * len(items))
    assert auc(*tensors) == pytest.approx(expected, nan_ok=True)
    expected, num_pairs = slow.auc_pairs(scores, labels, groups)
    result = grouped_auc(*tensors, torch.tensor(groups))
    assert result.auc == pytest.approx(expected, nan_ok=True)
    assert result.num_pairs == num_pairs


def test_gate_needs_evidence():
    assert auc_gate(math.nan, 0) == 0.0
    assert auc_gate(0.5, 10_000) == 0.0
    assert auc_gate(0.2, 10_000) == 0.0
    assert auc_gate(1.0, 1) == 0.0
    assert auc_gate(0.6, 10) == 0.0
    assert auc_gate(0.6, 1_000_000) == pytest.approx(0.2, abs=2e-3)
    assert auc_gate(1.0, 1_000_000) == pytest.approx(1.0, abs=1e-5)
    assert auc_gate(0.9, 50, z=0.0) == pytest.approx(0.8)


def test_gate_is_the_share_that_just_explains_what_was_seen():
    """Wilson's bound L solves auc - L = z * sqrt(L (1 - L) / n)."""
    for value, num_pairs in ((0.9, 60), (0.7, 200), (1.0, 12)):
        lower = (auc_gate(value, num_pairs) + 1) / 2
        assert value - lower == pytest.approx(1.645 * math.sqrt(lower * (1 - lower) / num_pairs))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10_000), st.integers(1, 10_000))
def test_gate_grows_with_evidence_and_stays_in_bounds(first, second, few, many):
    first, second = sorted((first, second))
    few, many = sorted((few, many))
    assert 0.0 <= auc_gate(first, few) <= auc_gate(second, few) + 1e-12 <= 1.0 + 1e-12
    assert auc_gate(second, few) <= auc_gate(second, many) + 1e-12


def test_step_scores_by_hand():
    rewards = torch.tensor([1.0, 3.0, -2.0, 4.0, 9.0])
    spans = [StepSpan(start=0, stop=2, correct=True), StepSpan(start=2, stop=3, correct=False)]
    assert step_scores(rewards, spans).tolist() == [2.0, -2.0]
    assert step_scores(rewards, []).shape == (0,)
    for start, stop in ((3, 6), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="span"):
            step_scores(rewards, [StepSpan(start=start, stop=stop, correct=True)])
