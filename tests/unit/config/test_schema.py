"""Defaults, ranges and what follows from several keys together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from schema_values import PRIME, made, problems_of

from megatron_prime.config.keys import hints_of, range_of, sections
from megatron_prime.config.schema import ArithmeticData, OptimizerSection, PrimeConfig, SftConfig


def test_minimal_config_gets_every_default():
    config = made({})
    assert isinstance(config.data, ArithmeticData)
    assert config.prm.optimizer == OptimizerSection(lr=1e-6, clip_grad=10.0)
    assert config.micro_batch.micro_batch_tokens == 8192


def test_partial_section_keeps_the_rest_of_its_own_default():
    assert made({"prm": {"optimizer": {"lr": 0.1}}}).prm.optimizer == OptimizerSection(lr=0.1, clip_grad=10.0)
    config = made({"prm": {"optimizer": {"weight_decay": 0.1}}, "policy": {"optimizer": {"clip_grad": 2}}})
    assert config.prm.optimizer == OptimizerSection(lr=1e-6, clip_grad=10.0, weight_decay=0.1)
    assert config.policy.optimizer == OptimizerSection(lr=5e-7, clip_grad=2.0, weight_decay=0.01)
    assert made({"micro_batch": {"packed": False}}).micro_batch.micro_batch_tokens == 8192


OUT_OF_RANGE = [
    ("run.num_steps", 0, ">= 1"),
    ("run.seed", -1, "in [0, 4294967296)"),
    ("run.seed", 2**32, "in [0, 4294967296)"),
    ("run.num_threads", 0, ">= 1"),
    ("parallel.world_size", 0, ">= 1"),
    ("parallel.timeout_seconds", 0, "> 0"),
    ("micro_batch.micro_batch_tokens", 0, ">= 1"),
    ("data.step_error_rate", 1, "in [0, 1)"),
    ("rollout.num_responses", 0, ">= 2"),
    ("rollout.temperature", 0, "> 0"),
    ("rollout.top_p", 0, "in (0, 1]"),
    ("rollout.top_p", 1.01, "in (0, 1]"),
    ("rollout.stop_token_ids", [1, -1], ">= 0"),
    ("verifier.memory_gib", 0, "> 0"),
    ("filter.min_accuracy", -0.1, "in [0, 1]"),
    ("filter.max_attempts", 0, ">= 1"),
    ("prm.beta", 0, "> 0"),
    ("prm.num_minibatches", 0, ">= 1"),
    ("prm.optimizer.adam_beta2", 1, "in [0, 1)"),
    ("advantage.process_coef", -1, ">= 0"),
    ("advantage.process_gamma", 1.1, "in [0, 1]"),
    ("advantage.gate_smoothing", 1, "in [0, 1)"),
    ("policy.clip_ratio_low", 0, "in (0, 1]"),
    ("policy.dual_clip", 1, "> 1"),
    ("policy.kl_coef", -0.1, ">= 0"),
    ("policy.optimizer.lr", 0, "> 0"),
    ("policy.optimizer.clip_grad", -1, ">= 0"),
    ("evaluation.temperature", -1, ">= 0"),
    ("checkpoint.keep_last", 0, ">= 1"),
]


@pytest.mark.parametrize(("key", "value", "expected"), OUT_OF_RANGE)
def test_number_out_of_range(key, value, expected):
    changes, (*names, last) = {}, key.split(".")
    section = changes
    for name in names:
        section[name] = section = dict(PRIME.get(name, {}))
    section[last] = value
    (problem,) = problems_of(changes)
    number = "[1]: -1" if isinstance(value, list) else f": {value}"
    assert problem == f"{key}{number} is out of range; must be {expected}"


def keys_of(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in hints_of(section).items():
        for inner in sections(hint):
            yield from keys_of(inner, f"{prefix}{name}.")
        if not sections(hint):
            yield f"{prefix}{name}", hint


def test_every_number_of_the_schema_has_a_range():
    keys = dict(keys_of(PrimeConfig)) | dict(keys_of(SftConfig))
    numbers = {key: hint for key, hint in keys.items() if {int, float} & set(plain_types(hint))}
    assert len(numbers) > 90
    assert [key for key, hint in numbers.items() if not range_of(hint)] == []


def plain_types(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from plain_types(part)


def test_a_part_of_the_users_own_is_taken_by_its_path():
    names = {"estimator": "mine.parts:centred", "process_source": "mine:judge"}
    config = made({"prm": {"loss": "a.b:c"}, "policy": {"loss": "a:d"}, "advantage": names})
    assert (config.prm.loss, config.policy.loss) == ("a.b:c", "a:d")
    assert (config.advantage.estimator, config.advantage.process_source) == ("mine.parts:centred", "mine:judge")


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [({}, True), ({"process_coef": 0}, False), ({"process_source": "mine:judge"}, False)],
)
def test_there_is_a_prm_where_process_rewards_come_from_it(advantage: dict[str, Any], expected: bool) -> None:
    assert made({"advantage": advantage}).uses_prm is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"policy": {"num_minibatches": 1}}, True),
        ({"policy": {"num_minibatches": 2}}, False),
        ({"policy": {"num_minibatches": 1, "importance_cap": 2.0}}, False),
        ({"policy": {"num_minibatches": 1, "max_sequence_ratio": 2.0}}, False),
        ({"policy": {"num_minibatches": 1}, "reference": {"source": "policy"}}, False),
    ],
)
def test_the_old_policys_pass_is_left_out_where_nobody_else_asks_for_it(
    changes: dict[str, Any], expected: bool
) -> None:
    assert made(changes).policy_scores_in_update is expected


def test_only_vllm_reads_its_section() -> None:
    engines = {"vllm": True, "transformers": False, "mine:engine": False}
    found = {name: made({"rollout": {"num_prompts": 4, "engine": name}}).rollout.uses_vllm for name in engines}
    assert found == engines
