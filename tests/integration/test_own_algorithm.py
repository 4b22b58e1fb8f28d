"""Estimators, process rewards and losses of one's own: the examples train, and broken ones are refused before that."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from small_task import prime_config, read_curve, run_prime, write_yaml

from megatron_prime.commands.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN = {
    "estimator": ("advantage", "estimator", "own_estimator:median_baseline"),
    "process_source": ("advantage", "process_source", "own_process_rewards:wrong_sums"),
    "prm_loss": ("prm", "loss", "own_prm_loss:focal"),
    "policy_loss": ("policy", "loss", "own_policy_loss:truncated_weight"),
}
BROKEN = """
import torch

def flat_estimator(rewards, mask, group_index, section):
    return rewards.sum(dim=1)

def leaking_estimator(rewards, mask, group_index, section):
    return rewards + 1.0

def rewards_in_place(inputs):
    inputs.rollout.outcomes.zero_()
    return inputs.rollout.mask.float()

def three_rows(inputs):
    return [[], [], []]

def mean_loss(responses):
    return responses.logits.mean()

def loss_without_gradient(responses):
    return responses.logits.detach().sum()

def nan_loss(tokens, section):
    return tokens.logprobs * float("nan"), tokens.logprobs > 0

def one_number(tokens, section):
    return (tokens.logprobs * tokens.weights).sum()

number = 3
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_parts.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "broken_parts", raising=False)


def two_steps(start: str, directory: Path, name: str, **sections) -> list[dict[str, float | None]]:
    run_prime(prime_config(start, str(directory), name, run={"num_steps": 2}, **sections))
    return read_curve(str(directory), name)


def test_every_example_trains_two_steps_and_changes_them(start: str, tmp_path: Path) -> None:
    usual = two_steps(start, tmp_path, "usual")
    for name, (section, key, value) in OWN.items():
        found = two_steps(start, tmp_path, name, **{section: {key: value}})
        assert [row.keys() - usual[i].keys() for i, row in enumerate(found)] == [set()] * 3
        assert found[1] != usual[1], name
        assert found[2]["policy/grad_norm"] > 0
    rule = read_curve(str(tmp_path), "process_source")
    # The rule knows nearly all wrong steps (those it cannot read it leaves at 0), and needs no PRM.
    assert min(rule[1]["prm/step_auc"], rule[2]["prm/step_auc"]) > 0.9
    assert not any(key in rule[1] for key in ("prm/loss", "prm/grad_norm"))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("advantage.estimator=broken_parts:flat_estimator", r"has shape \[4\], not \[4, 4\]"),
        ("advantage.estimator=broken_parts:leaking_estimator", "is not 0 on padding"),
        ("advantage.estimator=rlo", "did you mean 'rloo'"),
        ("advantage.process_source=broken_parts:rewards_in_place", "changes its arguments"),
        ("advantage.process_source=broken_parts:three_rows", "step rewards of 3 responses for a batch of 4"),
        ("prm.loss=broken_parts:mean_loss", "divide a sum over responses by num_responses"),
        ("prm.loss=broken_parts:loss_without_gradient", "no gradient"),
        ("policy.loss=broken_parts:nan_loss", "its losses has NaN or Inf"),
        ("policy.loss=broken_parts:one_number", "must return"),
        ("policy.loss=broken_parts:number", "is of type int, not a function"),
        ("policy.loss=broken_parts:missing", "cannot be imported"),
        ("policy.loss=no_such_module:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_broken_part_is_refused_by_check(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, reason: str
) -> None:
    path = write_yaml(tmp_path / "run.yaml", prime_config(start, str(tmp_path), "broken"))
    assert main(["check", str(path), setting]) == 2
    error = capsys.readouterr().err
    assert setting.partition("=")[0] in error and re.search(reason, error), error
    assert not (tmp_path / "broken").exists()
