"""The PRIME loop's decisions: when to sample more, what waits, who trains when, what stops a run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripted_parts import MemoryCheckpoints, ScriptedEngine, make_config, make_trainer

from megatron_prime.batch import Group, RolloutBatch
from megatron_prime.config.schema import (
    AdvantageSection,
    CheckpointSection,
    EvaluationSection,
    FilterSection,
    PolicySection,
    PrmSection,
    ReferenceSection,
    RolloutSection,
    RunSection,
)
from megatron_prime.errors import NonFiniteError, RunInterrupted, TrainingError
from megatron_prime.trainer.evaluation import derive_seed

KEPT, EASY, HARD = "1100", "1111", "0000"


def collected(trainer: Any) -> tuple[list[Group], RolloutBatch]:
    groups = trainer.collect()
    return groups, RolloutBatch.from_groups(groups)


def ids(groups: Any) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


def test_a_full_first_round_is_the_batch() -> None:
    engine = ScriptedEngine([KEPT])
    trainer, _ = make_trainer(make_config(), engine)
    groups, metrics = trainer.groups.collect()
    assert ids(groups) == ["0", "1", "2", "3"]
    assert engine.num_prompts == [4]
    assert metrics["filter/num_seen"] == metrics["filter/num_kept"] == 4
    assert metrics["filter/kept"] == 1.0
    assert metrics["rollout/accuracy"] == 0.5
    assert engine.is_asleep, "the models that train next may need its memory"


def test_refills_until_full_and_keeps_the_surplus_for_the_next_step() -> None:
    # Half of the first round is kept, so the refill asks for twice what is missing, and gets too much.
    engine = ScriptedEngine([KEPT, EASY, HARD, KEPT, KEPT, KEPT, KEPT, EASY, KEPT])
    trainer, _ = make_trainer(make_config(), engine)
    groups, metrics = trainer.groups.collect()
    assert engine.num_prompts == [4, 4]
    assert ids(groups) == ["0", "3", "4", "5"]
    counts = {name: metrics[f"filter/num_{name}"] for name in ("seen", "kept", "too_easy", "too_hard")}
    assert counts == {"seen": 8, "kept": 5, "too_easy": 2, "too_hard": 1}
    # The metrics describe all that was sampled, the dropped groups too.
    assert metrics["rollout/accuracy"] == pytest.approx((5 * 0.5 + 2 * 1 + 0) / 8)

    groups, _ = trainer.groups.collect()
    assert ids(groups) == ["6", "8", "9", "10"]
    assert engine.num_prompts == [4, 4, 4]
    assert ids(trainer.groups.collector.take()) == ["11"]


def test_a_refill_asks_for_what_is_missing_only() -> None:
    engine = ScriptedEngine([KEPT] * 7 + [HARD] + [KEPT])
    config = make_config(rollout=RolloutSection(num_prompts=8, num_responses=4))
    trainer, _ = make_trainer(config, engine)
    groups, _ = trainer.groups.collect()
    assert engine.num_prompts == [8, 2]  # one group is missing and 7 of 8 were kept
    assert ids(groups) == ["0", "1", "2", "3", "4", "5", "6", "8"]


def test_attempts_are_bounded() -> None:
    engine = ScriptedEngine([HARD])
    trainer, events = make_trainer(make_config(), engine)
    metrics = trainer.step()
    assert engine.num_prompts == [4, 4, 4]
    assert trainer.groups.position == 12
    assert metrics["filter/num_too_hard"] == 12
    assert not events


def test_too_few_groups_wait_and_nothing_trains(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine([HARD, KEPT, *[HARD] * 10, KEPT])
    trainer, events = make_trainer(make_config(), engine, min_groups=2)
    trainer.step()
    assert not events and len(trainer.groups.collector) == 1
    assert "trains nothing, without enough groups" in caplog.text and "(1 wait, 2 are needed;" in caplog.text
    groups, _ = trainer.groups.collect()
    assert ids(groups) == ["1", "12", "13", "14"]
    assert trainer.groups.num_empty_steps == 0


def test_a_smaller_batch_trains_when_every_rank_gets_a_share() -> None:
    engine = ScriptedEngine([HARD, KEPT, KEPT, HARD])
    trainer, events = make_trainer(make_config(filter=FilterSection(max_attempts=1)), engine, min_groups=2)
    trainer.step()
    assert events[-1] == "policy trains"
    assert trainer.parts.policy.batches[0][0].num_responses == 8


def test_five_empty_steps_end_the_run() -> None:
    trainer, _ = make_trainer(make_config(filter=FilterSection(max_attempts=1)), ScriptedEngine([EASY]))
    for _ in range(4):
        trainer.step()
    with pytest.raises(TrainingError, match=r"filter\.min_accuracy.*num_too_easy=4"):
        trainer.step()


def test_a_batch_in_between_forgives_empty_steps() -> None:
    script = [HARD] * 16 + [KEPT] * 4 + [HARD]
    trainer, events = make_trainer(make_config(filter=FilterSection(max_attempts=1)), ScriptedEngine(script))
    for _ in range(9):
        trainer.step()
    assert events.count("policy trains") == 1 and trainer.groups.num_empty_steps == 4


def test_missing_verdicts_shrink_a_group_and_may_drop_it() -> None:
    engine = ScriptedEngine(["1?00", "??1?", "????", KEPT])
    trainer, _ = make_trainer(make_config(filter=FilterSection(max_attempts=1)), engine)
    groups, metrics = trainer.groups.collect()
    assert ids(groups) == ["0", "3"]
    assert groups[0].rewards == (1.0, 0.0, 0.0) and len(groups[0].responses) == 3
    assert [response.text for response in groups[0].responses] == ["1", "0", "0"]
    assert metrics["filter/num_missing"] == 2


def test_every_round_has_its_own_seed_and_prompts() -> None:
    engine = ScriptedEngine([HARD])
    trainer, _ = make_trainer(make_config(), engine)
    trainer.groups.collect()
    asked = [prompts for prompts, _ in engine.requests]
    assert asked == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9", "10", "11"]]
    assert len({sampling.seed for _, sampling in engine.requests}) == 3
    assert all((s.num_responses, s.temperature, s.max_response_tokens) == (4, 1.0, 8) for _, s in engine.requests)


# One optimizer step on the whole batch brings along the scores of the model before it.
AFTER = ["reference scores", "prm trains", "policy trains"]
BEFORE = ["reference scores", "prm trains", "prm scores", "policy trains"]
SEPARATE = ["policy scores at 1", "reference scores", "prm scores", "prm trains", "policy trains"]


@pytest.mark.parametrize(("update", "order", "margin"), [("after", AFTER, 1), ("before", BEFORE, 2)])
def test_rewards_come_from_the_snapshot_that_prm_update_names(update, order, margin) -> None:
    config = make_config(prm=PrmSection(beta=0.1, update=update))
    trainer, events = make_trainer(config, ScriptedEngine([KEPT]), min_groups=1)
    groups, batch = collected(trainer)
    prm = trainer.train_prm(batch, trainer.score(batch))
    rewards = trainer.judge(groups, batch, prm)
    sign = (2 * batch.outcomes - 1)[:, None]
    assert torch.allclose(rewards, 0.1 * margin * sign * batch.mask)
    # The evidence is about the snapshot before the update, whoever pays the rewards.
    assert trainer.metrics["prm/fresh_loss"] == pytest.approx(math.log1p(math.exp(-0.2)), rel=1e-5)
    assert trainer.metrics["prm/fresh_accuracy"] == trainer.metrics["prm/fresh_auc"] == 1.0
    assert events == order[:-1]


def test_a_step_trains_the_prm_before_the_policy_and_refits_after() -> None:
    engine = ScriptedEngine([KEPT])
    trainer, events = make_trainer(make_config(), engine)
    trainer.refit(0)
    assert engine.weights["w"].item() == 0
    metrics = trainer.step()
    assert events == AFTER
    assert engine.weights["w"].item() == 1
    # From the log-probs that the update brought along.
    assert metrics["rollout/logprob_gap_mean"] == 0
    assert {"policy/loss", "prm/loss", "prm/gate", "advantage/outcome_share"} <= metrics.keys()


@pytest.mark.parametrize("policy", [PolicySection(num_minibatches=2), PolicySection(num_minibatches=2, num_epochs=2)])
def test_models_are_scored_apart_where_an_update_does_not_see_the_batch_as_it_was(policy) -> None:
    trainer, events = make_trainer(make_config(policy=policy), ScriptedEngine([KEPT]), scores_in_update=False)
    trainer.refit(0)
    metrics = trainer.step()
    assert events == SEPARATE
    assert metrics["rollout/logprob_gap_mean"] == 0


def test_scores_that_an_update_brought_along_are_in_the_window() -> None:
    trainer, _ = make_trainer(make_config(prm=PrmSection(num_window_batches=2)), ScriptedEngine([KEPT]))
    trainer.step()
    (batch,) = trainer.window
    sign = (2 * batch.rollout.outcomes - 1)[:, None]
    assert torch.equal(batch.prm_logprobs, batch.rollout.mask * (-1 + sign))


def test_the_record_of_a_failed_policy_update_has_the_logprobs_of_all_models() -> None:
    trainer, _ = make_trainer(make_config(), ScriptedEngine([KEPT]))
    trainer.parts.policy.fails = True
    with pytest.raises(NonFiniteError, match=r"policy update of step 1: loss nan\n.*replay policy_1\.pt"):
        trainer.step()
    ((update, reason),) = trainer.parts.failed_updates.kept
    batch, mask = update.batch, update.batch.rollout.mask
    assert reason == "loss nan" and update.role == "policy"
    assert torch.equal(batch.policy_logprobs, -1.0 * mask)
    assert torch.equal(batch.reference_logprobs, -1.0 * mask)
    assert torch.equal(batch.prm_logprobs, mask * (2 * batch.rollout.outcomes - 2)[:, None])
    assert update.advantages.abs().sum() > 0


def test_the_prm_trains_on_the_latest_batches() -> None:
    trainer, _ = make_trainer(make_config(prm=PrmSection(num_window_batches=2)), ScriptedEngine([KEPT]))
    for _ in range(3):
        trainer.step()
    first, second, third = trainer.parts.prm.windows
    assert [len(first), len(second), len(third)] == [1, 2, 2]
    assert second[0] is first[0] and third[0] is second[1]
    assert third[1].prompt_token_ids[0] == (9,)


def test_only_the_prm_trains_while_it_warms_up() -> None:
    trainer, events = make_trainer(make_config(prm=PrmSection(warmup_steps=2)), ScriptedEngine([KEPT]))
    trainer.train()
    assert events.count("prm trains") == 3 and events.count("policy trains") == 1
    assert events.count("policy scores at 1") == 2  # while it waits, for the gap to the engine


def test_the_gate_is_a_moving_average_of_evidence() -> None:
    advantage = AdvantageSection(process_gate="auc", gate_smoothing=0.25)
    trainer, _ = make_trainer(make_config(advantage=advantage), ScriptedEngine([KEPT]))
    gates = [trainer.step()["prm/gate"] for _ in range(2)]
    # 16 pairs, all in order: Wilson's lower bound is n / (n + z^2).
    single = 2 * 16 / (16 + 1.645**2) - 1
    assert gates == pytest.approx([0.75 * single, 0.9375 * single], rel=1e-6)


def test_without_the_gate_process_rewards_count_in_full() -> None:
    trainer, _ = make_trainer(make_config(), ScriptedEngine([KEPT]))
    assert trainer.step()["prm/gate"] == 1.0
    assert trainer.gate > 0  # still measured, for whoever resumes with the gate on


def test_the_frozen_reference_is_scored_when_there_is_one() -> None:
    config = make_config(advantage=AdvantageSection(process_coef=0.0))
    trainer, events = make_trainer(config, ScriptedEngine([KEPT]), prm=False)
    trainer.step()
    _, batch = collected(trainer)
    scores = trainer.score(batch)  # after an update: the policy has moved away
    assert events[-1] == "reference scores"
    assert torch.equal(scores.reference, -batch.mask.float())
    assert scores.policy is None and scores.prm is None


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, ["policy scores at 1"]), (0.5, ["policy scores at 0.5", "policy scores at 1"])],
)
def test_without_a_reference_the_policy_before_its_update_is_it(temperature, expected) -> None:
    rollout = RolloutSection(num_prompts=4, num_responses=4, temperature=temperature)
    config = make_config(rollout=rollout, reference=ReferenceSection(source="policy"))
    trainer, events = make_trainer(config, ScriptedEngine([KEPT]), reference=False, prm=False)
    trainer.refit(0)
    _, batch = collected(trainer)
    scores = trainer.score(batch)
    assert events == expected
    assert torch.equal(scores.reference, -1.0 * batch.mask)
    assert torch.equal(scores.policy, -1.0 * batch.mask / temperature)


def test_outcomes_alone_decide_without_a_prm() -> None:
    trainer, _ = make_trainer(
        make_config(advantage=AdvantageSection(process_coef=0.0, whiten=False)), ScriptedEngine([KEPT]), prm=False
    )
    metrics = trainer.step()
    assert not any(name.startswith("prm/") for name in metrics)
    ((batch, advantages),) = trainer.parts.policy.batches
    # Leave-one-out: a right answer beats the 1/3 of its siblings by 2/3.
    sign = (2 * batch.outcomes - 1)[:, None]
    assert torch.allclose(advantages, sign * batch.mask * 2 / 3)


def run_of(num_steps: int, checkpoints: MemoryCheckpoints, engine: ScriptedEngine) -> Any:
    config = make_config(
        run=RunSection(name="test", num_steps=num_steps),
        evaluation=EvaluationSection(every_steps=2, num_prompts=3, num_responses=2),
        checkpoint=CheckpointSection(every_steps=2),
    )
    return make_trainer(config, engine, checkpoints=checkpoints)[0]


def test_a_run_evaluates_saves_and_sums_up() -> None:
    checkpoints, engine = MemoryCheckpoints(), ScriptedEngine([KEPT], held_out="10")
    trainer = run_of(5, checkpoints, engine)
    summary = trainer.train()
    rows = trainer.parts.logger.rows
    assert list(rows) == [0, 1, 2, 3, 4, 5]
    assert [step for step, row in rows.items() if "evaluation/accuracy" in row] == [0, 2, 4, 5]
    assert sorted(checkpoints.saved) == [2, 4, 5] and checkpoints.awaited == {5}
    assert checkpoints.in_background == {2, 4}
    assert checkpoints.accuracies == {2: 0.5, 4: 0.5, 5: 0.5}
    assert (summary["num_steps"], summary["num_prompts_sampled"]) == (5, 20)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.5, 0.5)
    assert summary["accuracy_before_interval"][0] < 0.5 < summary["accuracy_before_interval"][1]
    assert summary["process_reward_auc"] is None  # no steps are known
    assert summary["prm_fresh_accuracy"] == summary["prm_fresh_auc"] == 1.0
    seeds = {sampling.seed for prompts, sampling in engine.requests if prompts[0].startswith("held out")}
    assert seeds == {derive_seed(1, "evaluation")}  # every evaluation draws the same randomness
    for step in range(1, 6):
        assert {"time/rollout_seconds", "time/score_seconds", "time/policy_update_seconds"} <= rows[step].keys()


def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    script = [KEPT, EASY, HARD, KEPT, KEPT, KEPT, KEPT, EASY, KEPT, KEPT, HARD] * 5
    whole = run_of(6, MemoryCheckpoints(), ScriptedEngine(script))
    expected = whole.train()

    checkpoints = MemoryCheckpoints()
    run_of(4, checkpoints, ScriptedEngine(script)).train()
    engine = ScriptedEngine(script)
    resumed = run_of(6, checkpoints, engine)
    found = resumed.train()
    assert list(resumed.parts.logger.rows) == [5, 6]
    assert not engine.requests[0][0][0].startswith("held out")  # the start was evaluated before
    assert resumed.num_steps_done == 6
    for key in ("num_steps", "num_prompts_sampled", "accuracy_before", "accuracy_after"):
        assert found[key] == expected[key]
    assert ids(resumed.groups.collector.take()) == ids(whole.groups.collector.take())


def test_the_engine_sleeps_while_models_are_restored() -> None:
    engine = ScriptedEngine([KEPT] * 40)

    class Watched(MemoryCheckpoints):
        def restore(self) -> Any:
            assert engine.is_asleep
            return super().restore()

    run_of(1, Watched(), engine).train()


def test_a_resumed_run_knows_what_the_engine_had_while_the_policy_waited() -> None:
    """PRM warm-up leaves the engine's weights what they were: answers from before are not stale."""
    script = [KEPT, EASY, HARD, KEPT, KEPT, KEPT, KEPT, EASY] + [KEPT] * 40

    def run(num_steps: int, checkpoints: MemoryCheckpoints) -> Any:
        config = make_config(
            run=RunSection(name="test", num_steps=num_steps),
            prm=PrmSection(beta=0.1, warmup_steps=3),
            checkpoint=CheckpointSection(every_steps=1),
        )
        trainer, _ = make_trainer(config, ScriptedEngine(script), checkpoints=checkpoints)
        trainer.train()
        return trainer.parts.logger.rows

    expected, checkpoints = run(4, MemoryCheckpoints()), MemoryCheckpoints()
    run(1, checkpoints)
    found = run(4, checkpoints)
    for step in (2, 3, 4):
        assert found[step]["rollout/stale"] == expected[step]["rollout/stale"]


def test_a_window_that_more_ranks_cannot_share_is_begun_anew() -> None:
    config = make_config(prm=PrmSection(beta=0.1, num_window_batches=3))
    trainer, _ = make_trainer(config, ScriptedEngine([KEPT]))
    trainer.step()
    trainer.step()
    state = trainer.state_dict()
    assert len(state["window"]) == 2
    others = [make_trainer(config, ScriptedEngine([KEPT]))[0] for _ in range(2)]
    others[1].parts = replace(others[1].parts, min_groups=8)
    for other in others:
        other.load_state_dict(state)
    assert [len(other.window) for other in others] == [2, 0]


def test_a_request_during_a_save_needs_no_other_step() -> None:
    checkpoints, engine = MemoryCheckpoints(), ScriptedEngine([KEPT])
    trainer = run_of(5, checkpoints, engine)
    trainer._should_stop = lambda: bool(checkpoints.saved)
    with pytest.raises(RunInterrupted, match="saved after step 2"):
        trainer.train()
    assert list(checkpoints.saved) == [2] and list(trainer.parts.logger.rows) == [0, 1, 2]
