"""What `check` finds in an estimator, process rewards and losses of the user's own, one broken part at a time."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
import torch

from megatron_prime.assembly.contracts.algorithm import check_own_algorithm, made_up_inputs
from megatron_prime.config import AnyConfig, load_config

ROOT = Path(__file__).resolve().parents[4]
MODEL = f"model.path={ROOT / 'configs' / 'models' / 'arithmetic'}"
ESTIMATORS = {
    "return rewards * mask": None,
    "return (rewards * mask).tolist()": "its result for rewards [4, 4] is a list, not a torch.Tensor",
    "return (rewards * mask)[:, :1]": "has shape [4, 1], not [4, 4]",
    "return rewards / 0": "has NaN or Inf",
    "return rewards * mask + 1": "is not 0 on padding",
    "rewards.mul_(2); return rewards * mask": "it changes its arguments",
    "raise KeyError('gamma')": "KeyError: 'gamma'",
}
PROCESS_REWARDS = {
    "return torch.where(inputs.rollout.mask, 1.0, 0.0)": None,
    "return [[StepReward(start=0, stop=1, reward=0.5)]] * 4": None,
    "return torch.zeros(4)": "what it returned for 4 answers of at most 4 tokens has shape [4], not [4, 4]",
    "return [[StepReward(start=0, stop=9, reward=0.5)]] * 4": "Error: ",
    "inputs.rollout.outcomes.zero_(); return inputs.rollout.mask * 1.0": "it changes its arguments",
}
PRM_LOSSES = {
    "return responses.logits.sum() / responses.num_responses": None,
    "return responses.logits.mean()": "the losses of parts of a mini-batch add up to",
    "return responses.logits.detach().sum()": "the loss has no gradient; it must depend on prm_logprobs",
    "return responses.logits": "the loss has shape [4], not []",
    "return (responses.logits - responses.logits).sqrt().sum()": "its gradient by prm_logprobs has NaN or Inf",
}
POLICY_LOSSES = {
    "return -tokens.advantages * tokens.log_ratio.exp(), torch.zeros_like(tokens.advantages)": None,
    "return -tokens.advantages * tokens.logprobs": "it must return (losses, is_cut), both one per token",
    "return tokens.advantages, torch.zeros_like(tokens.advantages)": "its losses have no gradient",
    "return tokens.logprobs.sum(), torch.zeros_like(tokens.advantages)": "its losses has shape [], not [10]",
    "tokens.advantages.zero_(); return tokens.logprobs * 1, tokens.advantages": "it changes its arguments",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module with a function of a given body; returns its import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def own(arguments: str, body: str) -> str:
        module = f"own_part_{uuid4().hex}"
        imports = "import torch\nfrom megatron_prime import StepReward\n"
        (tmp_path / f"{module}.py").write_text(f"{imports}def mine({arguments}):\n    {body}\n")
        return f"{module}:mine"

    return own


def config_with(*overrides: str) -> AnyConfig:
    return load_config(ROOT / "configs" / "arithmetic.yaml", [MODEL, *overrides])


def assert_says(key: str, name: str, complaint: str | None) -> None:
    problems = check_own_algorithm(config_with(f"{key}={name}"))
    if complaint is None:
        assert problems == []
        return
    (problem,) = problems
    assert problem.startswith(f"{key}: {name!r} tried on a made-up batch: ") and complaint in problem, problem


@pytest.mark.parametrize("body", ESTIMATORS)
def test_estimators(own, body: str) -> None:
    assert_says("advantage.estimator", own("rewards, mask, group_index, section", body), ESTIMATORS[body])


@pytest.mark.parametrize("body", PROCESS_REWARDS)
def test_process_rewards(own, body: str) -> None:
    assert_says("advantage.process_source", own("inputs", body), PROCESS_REWARDS[body])


@pytest.mark.parametrize("body", PRM_LOSSES)
def test_prm_losses(own, body: str) -> None:
    assert_says("prm.loss", own("responses", body), PRM_LOSSES[body])


@pytest.mark.parametrize("body", POLICY_LOSSES)
def test_policy_losses(own, body: str) -> None:
    assert_says("policy.loss", own("tokens, section", body), POLICY_LOSSES[body])


def test_what_cannot_be_imported_is_named_once_for_each_socket() -> None:
    config = config_with("prm.loss=no_such_module:loss", "policy.loss=math:no_such_name")
    assert [problem.split(":")[0] for problem in check_own_algorithm(config)] == ["prm.loss", "policy.loss"]


def test_built_in_parts_and_supervised_runs_are_not_tried() -> None:
    assert check_own_algorithm(config_with()) == []
    assert check_own_algorithm(load_config(ROOT / "configs" / "arithmetic_sft.yaml")) == []


def test_the_made_up_batch_has_answers_of_different_lengths_and_both_outcomes() -> None:
    batch = made_up_inputs().rollout
    assert batch.mask.sum(dim=1).tolist() == [4, 2, 3, 1]
    assert batch.group_index.tolist() == [0, 0, 1, 1]
    assert torch.equal(batch.outcomes, torch.tensor([1.0, 0.0, 0.0, 1.0]))
