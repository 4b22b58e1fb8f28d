"""Sections made in code: validated like those of a file, and otherwise plain dataclasses."""

import copy
import pickle
from dataclasses import asdict, fields, replace

import pytest
from pydantic import ValidationError

from megatron_prime.config.schema import (
    ArithmeticData,
    ModelSection,
    OptimizerSection,
    PrimeConfig,
    PrmSection,
    RolloutSection,
    RunSection,
)


def config() -> PrimeConfig:
    return PrimeConfig(
        run=RunSection(name="a", num_steps=3),
        model=ModelSection(path="m"),
        data=ArithmeticData(),
        rollout=RolloutSection(num_prompts=4),
    )


def test_construction_names_everything_that_is_wrong():
    with pytest.raises(ValidationError) as caught:
        PrmSection(beta=0, num_minibatches=True, soft_labels="no", loss="dpo", optimiser=None)  # type: ignore[call-arg]
    assert {error["loc"][0] for error in caught.value.errors()} == {
        "beta",
        "num_minibatches",
        "soft_labels",
        "loss",
        "optimiser",
    }


def test_replace_validates_the_new_section_and_leaves_the_old_one():
    section = PrmSection(beta=1)
    assert type(section.beta) is float
    changed = replace(section, num_minibatches=2, optimizer=OptimizerSection(lr=1))
    assert (changed.beta, changed.num_minibatches, changed.optimizer.lr) == (1.0, 2, 1.0)
    assert section == PrmSection(beta=1.0)
    with pytest.raises(ValidationError, match="num_minibatches"):
        replace(section, num_minibatches=0)


def test_sections_given_are_kept_and_can_be_changed_in_place():
    found = config()
    optimizer = OptimizerSection(lr=0.5)
    found.prm = PrmSection(optimizer=optimizer)
    optimizer.clip_grad = 3.0
    assert found.prm.optimizer is optimizer
    assert asdict(found)["prm"]["optimizer"]["clip_grad"] == 3.0
    with pytest.raises(AttributeError):
        found.prm.betta = 1  # type: ignore[attr-defined]


def test_defaults_are_not_shared():
    first, second = config(), config()
    first.prm.optimizer.lr = 9.0
    first.rollout.stop_token_ids.append(1)
    assert second.prm.optimizer.lr == 1e-6
    assert second.rollout.stop_token_ids == []


def test_a_copy_and_a_pickle_are_equal():
    found = config()
    found.policy.optimizer.lr = 0.25
    assert pickle.loads(pickle.dumps(found)) == found
    assert copy.deepcopy(found) == found
    assert [field.name for field in fields(found)][:3] == ["kind", "run", "model"]
