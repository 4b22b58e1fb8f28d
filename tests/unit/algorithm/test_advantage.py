"""Advantages against hand-computed numbers, a slow loop implementation, and their invariants."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import slow_reference as slow
import torch
from hypothesis import given, settings

from megatron_prime.algorithm import (
    compute_advantages,
    discounted_returns,
    grpo_process,
    leave_one_out,
    rloo_process,
    scale_process,
    whiten,
)
from megatron_prime.config.schema import AdvantageSection

OPTIONS = AdvantageSection(process_scale="none", whiten=False)
ESTIMATORS = ("rloo", "grpo", "reinforce")
SCALES = ("none", "max", "rms")


def options(**changes) -> AdvantageSection:
    return dataclasses.replace(OPTIONS, **changes)


def ragged(lengths: list[int], values: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and mask of responses with the given lengths; rubbish on the padding."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(mask.shape, dtype=torch.float64) if values is None else values
    return torch.where(mask, values, 77.0), mask


@st.composite
def batches(draw, max_width: int = 9):
    """(outcomes, process rewards, mask, group_index) with mixed group sizes, lengths and row order."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    groups = draw(st.permutations([label for label, size in enumerate(sizes) for _ in range(size)]))
    lengths = draw(st.lists(st.integers(1, max_width), min_size=len(groups), max_size=len(groups)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    process = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    outcomes = torch.randint(0, 5, (len(groups),), generator=generator).to(torch.float64) / 4
    return outcomes, torch.where(mask, process, 0.0), mask, torch.tensor(groups)


def test_leave_one_out_by_hand():
    values = torch.tensor([1.0, 5.0, 0.0, 0.0, 9.0])
    group_index = torch.tensor([0, 7, 0, 0, 7])  # group 0: rewards 1, 0, 0; group 7: rewards 5, 9
    assert leave_one_out(values, group_index).tolist() == [1.0, -4.0, -0.5, -0.5, 4.0]


def test_group_of_one_has_no_advantage():
    assert leave_one_out(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]
    mask = torch.tensor([[True, True]])
    for baseline in ("strict", "group"):
        assert rloo_process(torch.tensor([[1.0, 2.0]]), mask, torch.tensor([0]), baseline=baseline).eq(0).all()
    assert grpo_process(torch.tensor([[1.0, 2.0]]), mask, torch.tensor([0])).eq(0).all()


def test_both_process_baselines_by_hand():
    rewards, mask = ragged([2, 1, 3], torch.tensor([[1.0, 3.0, 0.0], [5.0, 0.0, 0.0], [0.0, 3.0, 6.0]]))
    group_index = torch.zeros(3, dtype=torch.int64)
    # Mean rewards per token are 2, 5, 3. strict subtracts the mean of the two others: 4, 2.5, 3.5.
    strict = rloo_process(rewards, mask, group_index, baseline="strict")
    assert strict.tolist() == [[-3.0, -1.0, 0.0], [2.5, 0.0, 0.0], [-3.5, -0.5, 2.5]]
    # group: r * 3/2 - (2 + 5 + 3)/2.
    group = rloo_process(rewards, mask, group_index, baseline="group")
    assert group.tolist() == [[-3.5, -0.5, 0.0], [2.5, 0.0, 0.0], [-5.0, -0.5, 4.0]]


def test_baselines_agree_on_the_first_return_and_differ_later_as_derived():
    torch.manual_seed(0)
    rewards, mask = ragged([4, 6, 5, 6])
    group_index = torch.zeros(4, dtype=torch.int64)
    strict = discounted_returns(rloo_process(rewards, mask, group_index, baseline="strict"), mask, 1.0)
    group = discounted_returns(rloo_process(rewards, mask, group_index, baseline="group"), mask, 1.0)
    torch.testing.assert_close(strict[:, 0], group[:, 0])
    own = torch.where(mask, rewards - (rewards * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True), 0.0)
    torch.testing.assert_close(group - strict, discounted_returns(own, mask, 1.0) / 3)


def test_response_without_tokens_is_no_opponent():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    rewards = torch.tensor([[1.0, 3.0], [50.0, 50.0], [4.0, 50.0]])
    centred = rloo_process(rewards, mask, torch.zeros(3, dtype=torch.int64), baseline="strict")
    assert centred.tolist() == [[-3.0, -1.0], [0.0, 0.0], [2.0, 0.0]]


def test_grpo_by_hand():
    # Means 1 and 3: mean 2, sample standard deviation sqrt(2).
    rewards, mask = ragged([2, 1], torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    expected = torch.tensor([[-2.0, 0.0], [1.0, 0.0]]) / 2**0.5
    torch.testing.assert_close(grpo_process(rewards, mask, torch.zeros(2, dtype=torch.int64)), expected)


def test_returns_by_hand():
    rewards, mask = ragged([3, 1], torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]]))
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0], [8.0, 0.0, 0.0]]
    assert discounted_returns(rewards, mask, 1.0).tolist() == [[7.0, 6.0, 4.0], [8.0, 0.0, 0.0]]
    assert discounted_returns(rewards, mask, 0.0).tolist() == [[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]]


@pytest.mark.parametrize("gamma", [0.3, 0.97, 1.0])
def test_returns_of_long_responses_match_the_loop(gamma):
    torch.manual_seed(1)
    rewards, mask = ragged([700, 1, 513, 512])
    expected = torch.zeros_like(rewards)
    following = torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(700)):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, 0.0)
        expected[:, t] = following
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma), expected, rtol=1e-12, atol=1e-12)
    single = discounted_returns(rewards.float(), mask, gamma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_scales_by_hand():
    rewards, mask = ragged([2, 1], torch.tensor([[1.0, -4.0], [2.0, 0.0]]))  # returns -3, -4 and 2
    scaled, divisor = scale_process(rewards, mask, mode="max", gamma=1.0)
    assert divisor == 4.0 and scaled.tolist() == [[0.25, -1.0], [0.5, 0.0]]
    assert scale_process(rewards, mask, mode="rms", gamma=1.0)[1] == pytest.approx((29 / 3) ** 0.5)
    scaled, divisor = scale_process(rewards, mask, mode="none", gamma=1.0)
    assert divisor == 1.0 and scaled.tolist() == [[1.0, -4.0], [2.0, 0.0]]


@pytest.mark.parametrize("mode", ["max", "rms"])
def test_noise_of_a_prm_that_equals_its_reference_is_dropped(mode):
    torch.manual_seed(2)
    noise, mask = ragged([5, 3], 1e-9 * torch.randn(2, 5))
    scaled, divisor = scale_process(noise, mask, mode=mode, gamma=1.0)
    assert scaled.eq(0).all() and 0 < divisor < 1e-6
    result = compute_advantages(
        torch.tensor([1.0, 0.0]), noise, mask, torch.tensor([0, 0]), options(process_scale=mode)
    )
    assert result.metrics["process_share"] == 0.0


def test_whiten_by_hand():
    values, mask = ragged([2, 1], torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(values, mask), expected, rtol=1e-7, atol=1e-7)


def test_whiten_does_not_blow_up_rounding():
    mask = torch.ones(3, 4, dtype=torch.bool)
    values = torch.full((3, 4), 0.1) + 1e-8 * torch.randn(3, 4)
    assert whiten(values, mask).eq(0).all()
    assert whiten(torch.tensor([[5.0]]), torch.tensor([[True]])).eq(0).all()


def test_diverged_process_rewards_are_not_hidden():
    mask = torch.ones(2, 3, dtype=torch.bool)
    process = torch.full((2, 3), torch.nan)
    for estimator in ESTIMATORS:
        for scale in SCALES:
            chosen = options(estimator=estimator, process_scale=scale, whiten=True)
            result = compute_advantages(torch.tensor([1.0, 0.0]), process, mask, torch.tensor([0, 0]), chosen)
            assert result.advantages.isnan().all()


def test_outcome_stands_on_the_last_token_and_is_discounted_from_there():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    outcomes, group_index = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    result = compute_advantages(outcomes, None, mask, group_index, options(outcome_gamma=0.5, outcome_coef=4.0))
    assert result.advantages.tolist() == [[1.0, 2.0, 4.0], [-4.0, 0.0, 0.0]]
    assert result.outcome_returns.tolist() == [[0.25, 0.5, 1.0], [-1.0, 0.0, 0.0]]
    assert result.process_returns.eq(0).all()
    assert (result.metrics["outcome_share"], result.metrics["process_share"]) == (1.0, 0.0)


def test_coefficients_and_gate_take_effect_and_are_reported():
    mask = torch.tensor([[True], [True]])
    outcomes, process, group_index = torch.tensor([1.0, 0.0]), torch.tensor([[0.0], [2.0]]), torch.tensor([0, 0])
    chosen = options(outcome_coef=2.0, process_coef=3.0)
    result = compute_advantages(outcomes, process, mask, group_index, chosen, gate=0.5)
    assert result.advantages.tolist() == [[2.0 * 1.0 + 1.5 * -2.0], [2.0 * -1.0 + 1.5 * 2.0]]
    assert result.metrics["outcome_share"] == pytest.approx(2 / 5)
    assert result.metrics["process_share"] == pytest.approx(3 / 5)
    assert result.metrics["outcome_std"] == pytest.approx(2**0.5)
    assert result.metrics["process_std"] == pytest.approx(2 * 2**0.5)


def test_unknown_options_and_shapes_are_refused():
    mask, group_index = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 0])
    outcomes = torch.tensor([1.0, 0.0])
    for wrong in ({"estimator": "ppo"}, {"process_baseline": "none"}, {"process_scale": "min"}):
        (key,) = wrong
        with pytest.raises(ValueError, match=key):
            AdvantageSection(**wrong)
    with pytest.raises(ValueError, match="process_rewards"):
        compute_advantages(outcomes, torch.ones(2, 4), mask, group_index, OPTIONS)
    with pytest.raises(ValueError, match="outcomes"):
        compute_advantages(outcomes[:1], None, mask, group_index, OPTIONS)


@settings(max_examples=60, deadline=None)
@given(
    batches(),
    st.sampled_from(ESTIMATORS),
    st.sampled_from(["strict", "group"]),
    st.sampled_from(SCALES),
    st.tuples(st.floats(0, 5), st.floats(0, 5)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.booleans(),
)
def test_matches_the_slow_reference(batch, estimator, baseline, scale, coefs, gammas, whitened):
    outcomes, process, mask, group_index = batch
    chosen = AdvantageSection(
        estimator=estimator,
        process_baseline=baseline,
        outcome_coef=coefs[0],
        process_coef=coefs[1],
        outcome_gamma=gammas[0],
        process_gamma=gammas[1],
        process_scale=scale,
        whiten=whitened,
    )
    expected = slow.advantages(
        outcomes.tolist(),
        slow.to_rows(process, mask),
        group_index.tolist(),
        estimator=estimator,
        baseline=baseline,
        coefs=coefs,
        gammas=gammas,
        scale=scale,
        whitened=whitened,
    )
    result = compute_advantages(outcomes, process, mask, group_index, chosen)
    torch.testing.assert_close(result.advantages, slow.to_padded(expected, mask.shape[1]), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(ESTIMATORS), st.sampled_from(SCALES), st.randoms(use_true_random=False))
def test_row_order_and_group_labels_never_matter(batch, estimator, scale, random):
    outcomes, process, mask, group_index = batch
    order = torch.tensor(random.sample(range(len(outcomes)), len(outcomes)))
    labels = torch.tensor(random.sample(range(100), int(group_index.max()) + 1))
    chosen = options(estimator=estimator, process_scale=scale, whiten=True, process_gamma=0.9)
    straight = compute_advantages(outcomes, process, mask, group_index, chosen).advantages
    shuffled = compute_advantages(outcomes[order], process[order], mask[order], labels[group_index[order]], chosen)
    torch.testing.assert_close(shuffled.advantages, straight[order], rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(ESTIMATORS), st.sampled_from(SCALES), st.integers(0, 4))
def test_padding_never_matters(batch, estimator, scale, extra):
    outcomes, process, mask, group_index = batch
    chosen = options(estimator=estimator, process_scale=scale, whiten=True, outcome_gamma=0.9)
    expected = compute_advantages(outcomes, process, mask, group_index, chosen).advantages
    rubbish = torch.nn.functional.pad(torch.where(mask, process, torch.nan), (0, extra), value=torch.inf)
    wider = torch.nn.functional.pad(mask, (0, extra))
    actual = compute_advantages(outcomes, rubbish, wider, group_index, chosen).advantages
    torch.testing.assert_close(actual[:, : mask.shape[1]], expected, rtol=1e-12, atol=1e-12)
    assert actual[~wider].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(
    batches(), st.sampled_from(["rloo", "grpo"]), st.floats(0, 1, width=32), st.floats(-3, 3, width=32), st.booleans()
)
def test_equal_rewards_give_exactly_no_advantage(batch, estimator, outcome, reward, is_double):
    outcomes, process, mask, group_index = batch
    dtype = torch.float64 if is_double else torch.float32
    for baseline in ("strict", "group"):
        for scale in SCALES:
            chosen = options(estimator=estimator, process_baseline=baseline, process_scale=scale, whiten=True)
            result = compute_advantages(
                torch.full_like(outcomes, outcome, dtype=dtype),
                torch.full_like(process, reward, dtype=dtype),
                mask,
                group_index,
                chosen,
            )
            assert result.advantages.dtype == dtype
            assert result.advantages.eq(0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_outcomes_alone_are_whitened_to_nothing(estimator):
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    chosen = options(estimator=estimator, whiten=True)
    result = compute_advantages(torch.full((3,), 0.3), None, mask, torch.tensor([0, 0, 0]), chosen)
    assert result.advantages.eq(0).all()


@settings(max_examples=30, deadline=None)
@given(batches())
def test_whitened_advantages_have_zero_mean_and_unit_variance(batch):
    outcomes, process, mask, group_index = batch
    result = compute_advantages(outcomes, process, mask, group_index, options(whiten=True, estimator="reinforce"))
    values = result.advantages[mask]
    if len(values) > 1:
        assert abs(values.mean()) < 1e-9
        assert values.std() == pytest.approx(1.0, abs=1e-3)


def test_spared_wrong_answers_are_not_pushed_at_all():
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    outcomes, group_index = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    section = AdvantageSection(wrong_answers="spare", process_coef=0.0)
    result = compute_advantages(outcomes, None, mask, group_index, section)
    # One right answer of two tokens, advantage 1, among seven tokens: the root mean square is sqrt(2 / 7).
    expected = torch.zeros(4, 2)
    expected[0] = (7 / 2) ** 0.5
    torch.testing.assert_close(result.advantages, expected)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline", "dr_grpo"])
def test_estimators_of_the_literature_by_their_names(name):
    outcomes, group_index = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    mask = torch.ones(4, 1, dtype=torch.bool)
    section = AdvantageSection(estimator=name, whiten=False)
    found = compute_advantages(outcomes, None, mask, group_index, section).advantages[:, 0]
    size = {"dr_grpo": 0.5, "reinforce_pp": 0.5 / (1 / 3) ** 0.5, "reinforce_pp_baseline": 0.5 / (1 / 3) ** 0.5}[name]
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, -1.0, 1.0]) * size)
