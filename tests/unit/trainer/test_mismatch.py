"""Every batch is compared with what the trainer's own weights say of it."""

from __future__ import annotations

import pytest
import torch
from scripted_parts import MemoryCheckpoints, ScriptedEngine, make_config, make_trainer

from megatron_prime.config.schema import PolicySection, RolloutSection
from megatron_prime.errors import TrainingError

KEPT = "1100"


@pytest.mark.parametrize(
    ("policy", "trained"), [(PolicySection(num_minibatches=2), []), (PolicySection(), ["prm", "policy"])]
)
def test_an_engine_with_other_weights_stops_the_run_before_anybody_gets_the_policy(policy, trained) -> None:
    """Where the policy's own update computes its log-probs, models have trained by then, for nothing."""
    engine, checkpoints = ScriptedEngine([KEPT]), MemoryCheckpoints()
    trainer, events = make_trainer(make_config(policy=policy), engine, checkpoints=checkpoints)
    trainer.refit(0)
    engine.weights["w"] += 0.5
    with pytest.raises(TrainingError, match=r"rollout.max_logprob_gap: the engine's log-probs are 0.5 nats"):
        trainer.step()
    assert [event for event in events if event.endswith("trains")] == [f"{name} trains" for name in trained]
    assert engine.weight_version == 0 and not checkpoints.saved


def test_answers_of_older_weights_are_counted_and_not_compared() -> None:
    engine = ScriptedEngine([KEPT])
    trainer, _ = make_trainer(make_config(), engine)
    trainer.refit(0)
    metrics = trainer.step()
    assert metrics["rollout/stale"] == 0 and metrics["rollout/logprob_gap_max"] == 0
    trainer.weight_version = 5
    metrics = trainer.step()
    assert metrics["rollout/stale"] == 1 and "rollout/logprob_gap_max" not in metrics


def test_importance_weights_reach_the_policy() -> None:
    given = []
    for section in (PolicySection(), PolicySection(importance_cap=0.25)):
        trainer, _ = make_trainer(make_config(policy=section), ScriptedEngine([KEPT]))
        trainer.refit(0)
        trainer.step()
        given.append(trainer.parts.policy.batches[-1][1])  # pyright: ignore[reportAttributeAccessIssue]
    assert given[0].abs().sum() > 0
    torch.testing.assert_close(given[1], 0.25 * given[0])


def test_the_limit_is_the_users() -> None:
    engine = ScriptedEngine([KEPT])
    base = make_config()
    section = RolloutSection(
        num_prompts=base.rollout.num_prompts, num_responses=base.rollout.num_responses, max_logprob_gap=1.0
    )
    trainer, _ = make_trainer(make_config(rollout=section), engine)
    trainer.refit(0)
    engine.weights["w"] += 0.5
    assert trainer.step()["rollout/logprob_gap_mean"] == pytest.approx(0.5)
