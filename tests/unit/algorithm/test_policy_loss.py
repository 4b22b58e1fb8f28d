"""The clipped policy loss: hand-computed, against loops, and cut in any way."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import slow_reference as slow
import torch
from hypothesis import given, settings

from megatron_prime.algorithm import PolicyLossMetrics, PolicyTokens, loss_weights, policy_loss
from megatron_prime.config.schema import PolicySection

OPTIONS = PolicySection()


def ppo_clip_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    section: PolicySection,
    reference: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyLossMetrics]:
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=advantages,
        weights=weights,
        reference_logprobs=reference,
    )
    return policy_loss(tokens, section)


def one_token(ratio: float, advantage: float, **changes) -> tuple[float, float, float]:
    """(loss, gradient by the log-prob, clip fraction) of one token of weight 1."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, weights = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, metrics = ppo_clip_loss(logprob, old, advantages, weights, dataclasses.replace(OPTIONS, **changes))
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), float(logprob.grad), float(metrics.clip_fraction)


def random_batch(seed: int, num_responses: int = 6):
    """mask and four float64 [B, R] tensors: logprobs, old, advantages, reference."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (num_responses,), generator=generator)
    lengths[0] = 5
    mask = torch.arange(5) < lengths[:, None]
    noise = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    logprobs = -1.0 - noise[0].abs()
    return mask, logprobs, logprobs + 0.3 * noise[1], noise[2], logprobs + 0.5 * noise[3]


def test_clipping_by_hand():
    assert one_token(1.0, 2.0) == (-2.0, -2.0, 0.0)
    assert one_token(1.5, 2.0) == pytest.approx((-2.4, 0.0, 1.0))  # gain bounded at 1.2
    assert one_token(0.5, 2.0) == pytest.approx((-1.0, -1.0, 0.0))  # a loss of probability is repaired
    assert one_token(0.5, -2.0) == pytest.approx((1.6, 0.0, 1.0))  # gain bounded at 0.8
    assert one_token(1.5, -2.0) == pytest.approx((3.0, 3.0, 0.0))


def test_clip_higher_and_dual_clip_by_hand():
    assert one_token(1.25, 1.0, clip_ratio_high=0.28) == pytest.approx((-1.25, -1.25, 0.0))
    assert one_token(1.30, 1.0, clip_ratio_high=0.28) == pytest.approx((-1.28, 0.0, 1.0))
    assert one_token(5.0, -1.0, dual_clip=3.0) == pytest.approx((3.0, 0.0, 1.0))
    assert one_token(2.0, -1.0, dual_clip=3.0) == pytest.approx((2.0, 2.0, 0.0))
    assert one_token(5.0, 1.0, dual_clip=3.0) == pytest.approx((-1.2, 0.0, 1.0))


def test_weights_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert loss_weights(mask, "token").tolist() == [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 6], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(loss_weights(mask, "sequence"), expected)
    for normalization in ("token", "sequence"):
        assert loss_weights(torch.zeros(2, 3, dtype=torch.bool), normalization).eq(0).all()
    with pytest.raises(ValueError, match="normalization"):
        loss_weights(mask, "batch")


def test_kl_to_the_reference_pulls_towards_it():
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference, zeros = torch.tensor([-2.0, -0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    chosen = dataclasses.replace(OPTIONS, kl_coef=0.1)
    loss, metrics = ppo_clip_loss(
        logprobs, logprobs.detach(), zeros, torch.full((2,), 0.5), chosen, reference=reference
    )
    expected = (math.exp(-1.0) - 1 + 1.0 + math.exp(0.5) - 1 - 0.5) / 2
    assert float(metrics.reference_kl) == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.1 * expected)
    loss.backward()
    assert logprobs.grad is not None and logprobs.grad[0] > 0 > logprobs.grad[1]


def test_kl_is_reported_without_gradient_where_it_is_no_loss():
    logprobs = torch.tensor([-1.0], requires_grad=True)
    zeros = torch.zeros(1)
    loss, metrics = ppo_clip_loss(
        logprobs, logprobs.detach(), zeros, torch.ones(1), OPTIONS, reference=torch.tensor([-2.0])
    )
    loss.backward()
    assert float(metrics.reference_kl) > 0 and logprobs.grad is not None and float(logprobs.grad) == 0.0
    with pytest.raises(ValueError, match="kl_coef"):
        ppo_clip_loss(logprobs, zeros, zeros, torch.ones(1), dataclasses.replace(OPTIONS, kl_coef=0.1))


def test_runaway_ratio_and_empty_part_stay_finite():
    logprobs = torch.tensor([-0.1], requires_grad=True)
    loss, metrics = ppo_clip_loss(logprobs, torch.tensor([-500.0]), torch.tensor([-1.0]), torch.ones(1), OPTIONS)
    loss.backward()
    assert loss.isfinite() and metrics.approx_kl.isfinite()
    empty = torch.zeros(0, requires_grad=True)
    loss, metrics = ppo_clip_loss(empty, empty, empty, empty, OPTIONS, reference=empty)
    loss.backward()
    assert loss.item() == 0.0 and [value.item() for value in metrics.as_dict().values()] == [0.0] * 4


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_matches_the_slow_reference(normalization, dual):
    for seed in range(5):
        mask, *tensors = random_batch(seed)
        logprobs, old, advantages, reference = (torch.where(mask, t, torch.nan) for t in tensors)
        chosen = PolicySection(
            clip_ratio_low=0.1, clip_ratio_high=0.25, dual_clip=dual, loss_normalization=normalization, kl_coef=0.2
        )
        weights = loss_weights(mask, normalization)
        loss, metrics = ppo_clip_loss(logprobs, old, advantages, weights, chosen, reference=reference)
        rows = [slow.to_rows(t, mask) for t in tensors]
        expected = slow.policy_loss(*rows, low=0.1, high=0.25, dual=dual, normalization=normalization, kl_coef=0.2)
        assert loss.item() == pytest.approx(expected.pop("loss"), rel=1e-6)
        assert {name: value.item() for name, value in metrics.as_dict().items()} == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.sampled_from(["token", "sequence"]),
    st.booleans(),
)
def test_parts_of_a_mini_batch_add_up(seed, assignment, normalization, packed):
    """Micro-batches, ranks, packed or padded: the same loss, gradient and metrics."""
    mask, values, old, advantages, reference = random_batch(seed)
    chosen = dataclasses.replace(OPTIONS, kl_coef=0.1, dual_clip=2.0)
    weights = loss_weights(mask, normalization).double()

    def run(parameter: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, PolicyLossMetrics]:
        part = [t[rows] for t in (parameter, old, advantages, weights, reference)]
        if packed:
            part = [t[mask[rows]] for t in part]
        return ppo_clip_loss(*part[:4], chosen, reference=part[4])

    whole = values.clone().requires_grad_()
    expected, expected_metrics = run(whole, torch.arange(6))
    expected.backward()
    cut = values.clone().requires_grad_()
    parts = [torch.tensor([i for i in range(6) if assignment[i] == part], dtype=torch.int64) for part in range(4)]
    results = [run(cut, rows) for rows in parts]
    total = torch.stack([loss for loss, _ in results]).sum()
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.grad, whole.grad, rtol=1e-12, atol=1e-12)
    for name, value in expected_metrics.as_dict().items():
        values_of_parts = torch.stack([metrics.as_dict()[name] for _, metrics in results])
        joined = values_of_parts.max() if name == "max_ratio" else values_of_parts.sum()
        torch.testing.assert_close(joined, value, rtol=1e-12, atol=1e-12)
