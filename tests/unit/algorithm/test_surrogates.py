"""GSPO and CISPO against loops over plain floats, with gradients by finite differences of the same loops."""

import math

import pytest
import torch

from megatron_prime.algorithm.policy_loss import PolicyTokens
from megatron_prime.algorithm.surrogates import cispo, cispo_losses, gspo, gspo_losses
from megatron_prime.config.schema import PolicySection


def random_batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (5,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    noise = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    logprobs = torch.where(mask, -1.0 - noise[0].abs(), 55.0)
    return logprobs.requires_grad_(), (logprobs + 0.3 * noise[1]).detach(), noise[2], mask


@pytest.mark.parametrize("seed", range(5))
def test_gspo_clips_the_geometric_mean_ratio_of_a_response(seed):
    logprobs, old, _, mask = random_batch(seed)
    advantage = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    losses, is_cut = gspo_losses(logprobs, old, advantage[:, None].expand(5, 5), mask, clip_low=0.1, clip_high=0.15)
    lengths = mask.sum(dim=1)
    (losses.sum(dim=1) / lengths).sum().backward()
    assert logprobs.grad is not None
    for i in range(5):
        length, a = int(lengths[i]), float(advantage[i])
        ratio = math.exp(math.fsum((logprobs[i, t] - old[i, t]).item() for t in range(length)) / length)
        clipped = min(max(ratio, 0.9), 1.15)
        # GSPO's own objective: one ratio and one advantage per response.
        assert float(losses[i].sum()) / length == pytest.approx(max(-a * ratio, -a * clipped))
        cut = -a * clipped > -a * ratio
        assert is_cut[i].tolist() == [cut and t < length for t in range(5)]
        slope = 0.0 if cut else -a * ratio / length  # d exp(mean of logs) / d each log
        assert logprobs.grad[i].tolist() == pytest.approx([slope if t < length else 0.0 for t in range(5)])


def test_gspo_keeps_the_advantage_of_each_token():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    losses, _ = gspo_losses(
        logprobs, logprobs.detach(), torch.tensor([[3.0, -5.0]]), torch.ones(1, 2).bool(), clip_low=0.1, clip_high=0.1
    )
    losses.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[-3.0, 5.0]]


@pytest.mark.parametrize("seed", range(5))
def test_cispo_bounds_the_weight_and_keeps_every_gradient(seed):
    logprobs, old, advantages, mask = random_batch(seed)
    losses, is_cut = cispo_losses(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.1)
    losses.sum().backward()
    assert logprobs.grad is not None
    for i in range(5):
        for t in range(5):
            if not mask[i, t]:
                assert losses[i, t] == 0 and logprobs.grad[i, t] == 0 and not is_cut[i, t]
                continue
            ratio = math.exp((logprobs[i, t] - old[i, t]).item())
            weight = min(max(ratio, 0.8), 1.1)
            assert float(losses[i, t]) == pytest.approx(-weight * (advantages[i, t] * logprobs[i, t]).item())
            assert float(logprobs.grad[i, t]) == pytest.approx(-weight * float(advantages[i, t]))
            assert bool(is_cut[i, t]) == (not 0.8 <= ratio <= 1.1)


def test_gspo_on_flat_tokens_of_whole_responses_is_gspo_on_rows():
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(4) < torch.tensor([3, 1, 4])[:, None]
    logprobs, old, advantages = (torch.randn(3, 4, generator=generator) for _ in range(3))
    section = PolicySection(clip_ratio_low=0.05, clip_ratio_high=0.1)
    flat = logprobs[mask].requires_grad_()
    tokens = PolicyTokens(
        logprobs=flat,
        old_logprobs=old[mask],
        advantages=advantages[mask],
        weights=torch.full((8,), 1 / 8),
        sequences=mask.nonzero()[:, 0] + 5,
    )
    losses, is_cut = gspo(tokens, section)
    rows = logprobs.clone().requires_grad_()
    expected, expected_cut = gspo_losses(rows, old, advantages, mask, clip_low=0.05, clip_high=0.1)
    torch.testing.assert_close(losses, expected[mask])
    assert torch.equal(is_cut, expected_cut[mask])
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(flat.grad, rows.grad[mask])
    assert gspo.whole_sequences


def test_cispo_takes_its_bounds_from_the_configuration():
    tokens = PolicyTokens(
        logprobs=torch.tensor([0.0, -1.0], requires_grad=True),
        old_logprobs=torch.tensor([-1.0, -1.0]),
        advantages=torch.tensor([1.0, -2.0]),
        weights=torch.full((2,), 0.5),
    )
    losses, is_cut = cispo(tokens, PolicySection(clip_ratio_high=0.3))
    assert losses.tolist() == pytest.approx([0.0, -2.0]) and is_cut.tolist() == [True, False]
