"""How many prompts are sampled for a batch, with which seeds, and what is done where too few groups are kept."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_parts import NumberedPrompts, ScriptedEngine, ScriptVerifier

from megatron_prime.config.schema import (
    ArithmeticData,
    FilterSection,
    ModelSection,
    PrimeConfig,
    RolloutSection,
    RunSection,
)
from megatron_prime.errors import TrainingError
from megatron_prime.trainer.group_sampler import GroupSampler, sampling_params
from megatron_prime.trainer.stages import Stages

MIXED, SOLVED, FAILED = "10", "11", "00"


def make(script: list[str], *, min_groups: int = 1, **changes: Any) -> tuple[GroupSampler, ScriptedEngine]:
    engine = ScriptedEngine(script)
    config = PrimeConfig(
        run=RunSection(name="test", num_steps=1, seed=3),
        model=ModelSection(path="model"),
        data=ArithmeticData(),
        rollout=RolloutSection(num_prompts=4, num_responses=2, temperature=0.7, stop_token_ids=[5]),
        filter=FilterSection(**({"max_attempts": 3} | changes)),
    )
    stages = Stages(lambda stage: None)
    stages.step = 1
    return GroupSampler(config, engine, ScriptVerifier(), NumberedPrompts(), stages, min_groups), engine  # pyright: ignore[reportArgumentType]


def prompt_ids(groups: list[Any]) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


def test_a_round_samples_what_should_fill_the_batch_by_the_share_that_was_kept() -> None:
    # Half of the first four groups are kept: for the two that are missing four more are sampled.
    sampler, engine = make([MIXED, SOLVED, MIXED, FAILED, MIXED, SOLVED, MIXED, MIXED])
    groups, metrics = sampler.collect()
    assert engine.num_prompts == [4, 4]
    assert prompt_ids(groups) == ["0", "2", "4", "6"]
    assert metrics["filter/kept"] == 5 / 8 and sampler.position == 8
    # The one that is left over waits, and the next round asks for what is missing by the latest share.
    assert len(sampler.collector) == 1
    groups, _ = sampler.collect()
    assert prompt_ids(groups)[0] == "7" and engine.num_prompts[2] == 4
    assert engine.is_asleep


def test_attempts_are_limited_and_a_smaller_batch_is_taken() -> None:
    sampler, engine = make([MIXED, *[SOLVED] * 3, MIXED, *[SOLVED] * 20])
    groups, metrics = sampler.collect()
    assert len(engine.num_prompts) == 3 and prompt_ids(groups) == ["0", "4"]
    assert metrics["filter/kept"] == 2 / sum(engine.num_prompts)


def test_too_few_groups_wait_and_in_the_end_are_an_error(caplog: pytest.LogCaptureFixture) -> None:
    sampler, _ = make([MIXED, SOLVED], min_groups=2)
    for number in range(1, 5):
        groups, _ = sampler.collect()
        assert groups == [] and sampler.num_empty_steps == number and len(sampler.collector) == 1
    assert "step 1 trains nothing, without enough groups" in caplog.text
    with pytest.raises(TrainingError, match=r"5 steps without enough groups .*\(1 wait, 2 are needed"):
        sampler.collect()


def test_a_batch_ends_the_row_of_steps_without_one() -> None:
    sampler, _ = make([*[SOLVED] * 12, *[MIXED] * 20], min_groups=2)
    assert sampler.collect()[0] == [] and sampler.num_empty_steps == 1
    assert len(sampler.collect()[0]) == 4 and sampler.num_empty_steps == 0


def test_answers_without_a_verdict_are_left_out_of_their_group() -> None:
    sampler, _ = make([MIXED, "?100", MIXED, MIXED])
    groups, metrics = sampler.collect()
    assert [len(group.responses) for group in groups] == [2, 3, 2, 2]
    assert groups[1].rewards == (1.0, 0.0, 0.0)
    assert [response.text for response in groups[1].responses] == ["1", "0", "0"]
    assert metrics["verdict/missing"] == 1 / 10


def test_seeds_follow_the_position_so_that_a_resumed_run_samples_the_same() -> None:
    script = [MIXED, SOLVED, MIXED, FAILED, *[MIXED] * 8]
    sampler, engine = make(script)
    first, _ = sampler.collect()
    state = sampler.state_dict()
    rest, _ = sampler.collect()
    resumed, again = make(script)
    resumed.load_state_dict(state)
    assert resumed.position == state["position"] == 8
    groups, _ = resumed.collect()
    assert prompt_ids(groups) == prompt_ids(rest) != prompt_ids(first)
    assert again.requests == engine.requests[-len(again.requests) :]
    seeds = [sampling.seed for _, sampling in engine.requests]
    assert len(set(seeds)) == len(seeds)


def test_sampling_parameters_are_those_of_the_section() -> None:
    section = RolloutSection(num_prompts=1, num_responses=3, temperature=0.5, top_p=0.9, stop_token_ids=[7, 8])
    params = sampling_params(section, 11)
    assert (params.num_responses, params.temperature, params.top_p, params.seed) == (3, 0.5, 0.9, 11)
    assert params.stop_token_ids == (7, 8) and params.max_response_tokens == section.max_response_tokens
