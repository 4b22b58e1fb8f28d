"""Strict decoding: every wrong value is reported with its full key path, all at once."""

import pytest

from megatron_prime.config.decode import decode
from megatron_prime.config.schema import (
    AnyConfig,
    ArithmeticData,
    FileData,
    OptimizerSection,
    OwnData,
    PrimeConfig,
    SftConfig,
)

PRIME = {
    "kind": "prime",
    "run": {"name": "a", "num_steps": 3},
    "model": {"path": "m"},
    "data": {"kind": "arithmetic"},
    "rollout": {"num_prompts": 4},
}


def decoded(changes: dict) -> tuple[object, list[str]]:
    problems: list[str] = []
    return decode(AnyConfig, {**PRIME, **changes}, problems), problems


def test_minimal_config_gets_every_default():
    config, problems = decoded({})
    assert problems == []
    assert isinstance(config, PrimeConfig)
    assert isinstance(config.data, ArithmeticData)
    assert config.prm.optimizer == OptimizerSection(lr=1e-6, clip_grad=10.0)
    assert config.micro_batch.micro_batch_tokens == 8192


def test_kind_selects_the_dataclass():
    sft = {**PRIME, "kind": "sft", "sft": {"batch_size": 2, "optimizer": {"lr": 1}}}
    del sft["rollout"]
    problems: list[str] = []
    config = decode(AnyConfig, sft, problems)
    assert problems == []
    assert isinstance(config, SftConfig)
    config, problems = decoded({"data": {"kind": "files", "train": ["a.jsonl"]}})
    assert isinstance(config, PrimeConfig)
    assert config.data == FileData(train=["a.jsonl"])
    assert problems == []


def test_own_prompts_take_any_options_and_belong_to_prime_runs():
    own = {"kind": "own", "factory": "a:b", "options": {"largest": 9, "nested": {"names": ["x"]}}}
    config, problems = decoded({"data": own})
    assert problems == [] and isinstance(config, PrimeConfig)
    assert config.data == OwnData(factory="a:b", options=own["options"])
    problems = []
    sft = {"run": PRIME["run"], "model": PRIME["model"], "sft": {"batch_size": 2, "optimizer": {"lr": 1}}}
    decode(AnyConfig, {"kind": "sft", "data": own, **sft}, problems)
    assert problems == ["data.kind: 'own' is not a choice; choose one of 'arithmetic', 'files'"]


def test_partial_section_keeps_the_rest_of_its_own_default():
    config, problems = decoded({"prm": {"optimizer": {"weight_decay": 0.1}}})
    assert problems == []
    assert isinstance(config, PrimeConfig)
    assert config.prm.optimizer == OptimizerSection(lr=1e-6, clip_grad=10.0, weight_decay=0.1)


@pytest.mark.parametrize("value", [1, 1.0, "1", "1e0", "1.0"])
def test_numbers_are_taken_as_floats(value):
    config, problems = decoded({"prm": {"beta": value}})
    assert problems == []
    assert isinstance(config, PrimeConfig)
    assert type(config.prm.beta) is float
    assert config.prm.beta == 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prm": {"betta": 1}}, "prm.betta: unknown key; did you mean 'beta'?"),
        ({"evaluation": {"xyz": 1}}, "evaluation.xyz: unknown key; known keys: every_steps, num_prompts"),
        ({"rolout": {}}, "rolout: unknown key; did you mean 'rollout'?"),
        ({"run": {"name": "a"}}, "run.num_steps: missing"),
        ({"data": {}}, "data.kind: missing; choose one of 'arithmetic', 'files'"),
        ({"data": {"kind": "file"}}, "data.kind: 'file' is not a choice (did you mean 'files'?)"),
        ({"data": [1]}, "data: expected a mapping of keys, got [1] (list)"),
        ({"data": {"kind": "files"}}, "data.train: missing"),
        ({"data": {"kind": "own", "options": {}}}, "data.factory: missing"),
        ({"data": {"kind": "own", "factory": "a:b", "options": [1]}}, "data.options: expected a mapping of keys"),
        ({"data": {"kind": "own", "factory": "a:b", "options": {1: 2}}}, "data.options: expected a mapping of keys"),
        ({"data": {"kind": "files", "train": "a.jsonl"}}, "data.train: expected a list, got 'a.jsonl' (str)"),
        (
            {"data": {"kind": "files", "train": ["a", 3]}},
            "data.train[1]: expected text (put it in quotes), got 3 (int)",
        ),
        ({"kind": "ppo"}, "kind: 'ppo' is not a choice; choose one of 'prime', 'sft'"),
        ({"prm": None}, "prm: expected a mapping of keys, got null"),
        ({"prm": {"beta": True}}, "prm.beta: expected a number, got True (bool)"),
        ({"prm": {"beta": "much"}}, "prm.beta: expected a number, got 'much' (str)"),
        ({"prm": {"beta": float("nan")}}, "prm.beta: expected a finite number"),
        ({"prm": {"beta": "inf"}}, "prm.beta: expected a finite number"),
        ({"prm": {"beta": 10**400}}, "prm.beta: expected a number"),
        ({"prm": {"num_minibatches": True}}, "prm.num_minibatches: expected a whole number, got True (bool)"),
        ({"prm": {"num_minibatches": 2.0}}, "prm.num_minibatches: expected a whole number, got 2.0 (float)"),
        ({"prm": {"num_minibatches": "2"}}, "prm.num_minibatches: expected a whole number, got '2' (str)"),
        ({"prm": {"num_minibatches": None}}, "prm.num_minibatches: expected a whole number, got null"),
        ({"prm": {"soft_labels": 1}}, "prm.soft_labels: expected true or false, got 1 (int)"),
        ({"prm": {"path": 7}}, "prm.path: expected text (put it in quotes), got 7 (int)"),
        ({"prm": {"loss": "dpo"}}, "prm.loss: 'dpo' is not a choice; choose one of 'cross_entropy', 'pairwise'"),
        ({"prm": {"optimizer": {"beta1": 0.9}}}, "prm.optimizer.beta1: unknown key; did you mean 'adam_beta1'?"),
        ({"rollout": {"num_prompts": 1, "stop_token_ids": [1.5]}}, "rollout.stop_token_ids[0]: expected a whole"),
    ],
)
def test_one_wrong_value(changes, expected):
    _, problems = decoded(changes)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_all_problems_are_found_in_one_pass():
    _, problems = decoded({"run": {"num_steps": "x"}, "model": {}, "prm": {"beta": [], "lr": 1}, "extra": 1})
    assert sorted(problem.split(":")[0] for problem in problems) == [
        "extra",
        "model.path",
        "prm.beta",
        "prm.lr",
        "run.name",
        "run.num_steps",
    ]
