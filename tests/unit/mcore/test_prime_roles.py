"""Policy, PRM and SFT model on one rank: updates report what they saw before, and responses' parts add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from slow_reference import cross_entropy, to_rows
from tiny_models import role_setup, save_tiny_model

from megatron_prime.batch import PrmBatch, RolloutBatch, ScoredBatch, SftExample
from megatron_prime.config.schema import OptimizerSection, ParallelSection, PolicySection, PrmSection
from megatron_prime.errors import NonFiniteError
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.prime_roles import PolicyRole, PrmRole, ReferenceRole, SftRole
from megatron_prime.mcore.role import RoleSetup
from megatron_prime.weights.hf_folder import HfFolder

LENGTHS = torch.tensor([3, 5, 1, 4])
MASK = torch.arange(5) < LENGTHS[:, None]
OPTIMIZER = OptimizerSection(lr=1e-2, adam_eps=1e-3, clip_grad=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@contextmanager
def setup_of(folder: Path) -> Iterator[RoleSetup]:
    parallel = ParallelSection()
    with parallel_layout(parallel, seed=1) as layout:
        yield role_setup(folder, "float32", parallel, layout)


def make_batch(seed: int = 0) -> RolloutBatch:
    generator = torch.Generator().manual_seed(seed)
    return RolloutBatch(
        prompt_token_ids=((5, 6), (5, 6), (7, 8, 9), (7, 8, 9)),
        response_ids=torch.randint(2, 131, MASK.shape, generator=generator) * MASK,
        mask=MASK,
        rollout_logprobs=torch.zeros(MASK.shape),
        outcomes=torch.tensor([1.0, 0.0, 0.5, 1.0]),
        group_index=torch.tensor([0, 0, 1, 1]),
        weight_versions=torch.zeros(4, dtype=torch.int64),
    )


def test_the_policy_raises_what_has_an_advantage_and_reports_its_old_logprobs(folder: Path) -> None:
    batch, advantages = make_batch(), torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None] * MASK
    with setup_of(folder) as setup:
        role = PolicyRole(setup, PolicySection(optimizer=OPTIMIZER, num_minibatches=1), num_steps=3)
        role.load_hf(HfFolder(folder))
        before = role.score(batch, temperature=0.8)
        result = role.update(batch, advantages, old_logprobs=None, reference_logprobs=None, temperature=0.8, seed=1)
        after = role.score(batch, temperature=0.8)
    torch.testing.assert_close(result.logprobs, before, rtol=0, atol=1e-5)
    assert float(((after - before) * advantages).sum()) > 0.1
    # The ratio is 1 in the first step: the loss is minus the mean advantage.
    assert result.metrics["loss"] == pytest.approx(-float(advantages.sum() / MASK.sum()), abs=1e-6)
    assert (result.metrics["max_ratio"], result.metrics["clip_fraction"]) == (1.0, 0.0)


def test_responses_parts_of_the_policys_loss_sum_to_it(folder: Path) -> None:
    batch, advantages = make_batch(), torch.linspace(-1, 1, MASK.numel()).view(MASK.shape) * MASK
    section = PolicySection(optimizer=OPTIMIZER, kl_coef=0.1, num_minibatches=1)
    with setup_of(folder) as setup:
        role = PolicyRole(setup, section, num_steps=3)
        role.load_hf(HfFolder(folder))
        scored = ScoredBatch(
            rollout=batch,
            policy_logprobs=role.score(batch, temperature=1.0) - 0.1 * MASK,
            reference_logprobs=torch.full(MASK.shape, -4.0) * MASK,
            prm_logprobs=None,
        )
        rows = role.measure_rows(scored, advantages, temperature=1.0)
        result = role.update(
            batch,
            advantages,
            old_logprobs=scored.policy_logprobs,
            reference_logprobs=scored.reference_logprobs,
            temperature=1.0,
            seed=1,
        )
    assert len(rows) == 4
    for key in ("loss", "reference_kl", "kl"):
        assert result.metrics[key] == pytest.approx(sum(row[key] for row in rows), rel=1e-4), key
    assert result.logprobs is scored.policy_logprobs


def test_the_prm_trains_on_the_window_and_then_on_the_new_batch(folder: Path) -> None:
    batch, older = make_batch(), make_batch(seed=1)
    reference = torch.full(MASK.shape, -5.0) * MASK
    section = PrmSection(beta=0.2, optimizer=OPTIMIZER, num_window_batches=2)
    with setup_of(folder) as setup:
        role = PrmRole(setup, section, num_steps=3)
        role.load_hf(HfFolder(folder))
        before = role.score(batch)
        window = [PrmBatch(rollout=older, reference_logprobs=reference, prm_logprobs=role.score(older))]
        parts = role.measure_rows(PrmBatch(rollout=batch, reference_logprobs=reference, prm_logprobs=before))
        result = role.update(batch, reference_logprobs=reference, prm_logprobs=before, window=window, seed=1)
        assert not role.scores_in_update
    logits = [0.2 * sum(row) for row in to_rows(before - reference, MASK)]
    expected = cross_entropy(logits, [1.0, 0.0, 0.0, 1.0])  # half of a reward is no full one
    assert sum(part["loss"] for part in parts) == pytest.approx(expected, rel=1e-4)
    assert result.logprobs is before
    # The mean of both batches' losses, the second one after a step on the first.
    assert result.metrics["loss"] != pytest.approx(expected, rel=1e-3)


def test_without_a_window_the_prms_own_pass_supplies_its_scores(folder: Path) -> None:
    batch, reference = make_batch(), torch.full(MASK.shape, -5.0) * MASK
    with setup_of(folder) as setup:
        role = PrmRole(setup, PrmSection(optimizer=OPTIMIZER), num_steps=3)
        role.load_hf(HfFolder(folder))
        before = role.score(batch)
        assert role.scores_in_update
        result = role.update(batch, reference_logprobs=reference, prm_logprobs=None, window=(), seed=1)
        pairwise = PrmRole(setup, PrmSection(optimizer=OPTIMIZER, loss="pairwise"), num_steps=3)
        assert not pairwise.scores_in_update
    torch.testing.assert_close(result.logprobs, before, rtol=0, atol=1e-5)


def test_an_update_that_is_not_finite_carries_the_scores(folder: Path) -> None:
    batch = make_batch()
    advantages = torch.where(MASK, torch.inf, 0.0)
    with setup_of(folder) as setup:
        role = PolicyRole(setup, PolicySection(optimizer=OPTIMIZER, num_minibatches=1), num_steps=3)
        role.load_hf(HfFolder(folder))
        before = role.score(batch, temperature=1.0)
        with pytest.raises(NonFiniteError) as caught:
            role.update(batch, advantages, old_logprobs=None, reference_logprobs=None, temperature=1.0, seed=1)
        assert torch.equal(role.score(batch, temperature=1.0), before)
    assert caught.value.logprobs is not None
    torch.testing.assert_close(caught.value.logprobs, before, rtol=0, atol=1e-5)


def test_imitation_lowers_the_loss_and_a_reference_scores_as_the_folder_does(folder: Path) -> None:
    examples = [SftExample(prompt_token_ids=(5, 6), response_token_ids=(9, 10, 1))] * 2
    batch = make_batch()
    with setup_of(folder) as setup:
        role = SftRole(setup, OPTIMIZER, num_optimizer_steps=9)
        role.load_hf(HfFolder(folder))
        losses = [role.update(examples)["loss"] for _ in range(5)]
        reference, policy = ReferenceRole(setup), PolicyRole(setup, PolicySection(), num_steps=1)
        for model in (reference, policy):
            model.load_hf(HfFolder(folder))
        assert torch.equal(reference.score(batch), policy.score(batch, temperature=1.0))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
