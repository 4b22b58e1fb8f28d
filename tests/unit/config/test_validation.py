"""Every wrong value is reported with its full key path, all at once."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from megatron_prime.config.keys import hints_of, range_of, sections
from megatron_prime.config.schema import AnyConfig, ArithmeticData, FileData, OptimizerSection, PrimeConfig, SftConfig
from megatron_prime.config.validation import validate
from megatron_prime.errors import ConfigError

PRIME = {
    "kind": "prime",
    "run": {"name": "a", "num_steps": 3},
    "model": {"path": "m"},
    "data": {"kind": "arithmetic"},
    "rollout": {"num_prompts": 4},
}


def made(changes: dict) -> PrimeConfig:
    config = validate(AnyConfig, {**PRIME, **changes})
    assert isinstance(config, PrimeConfig)
    return config


def problems_of(changes: dict) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate(AnyConfig, {**PRIME, **changes})
    return caught.value.problems


def test_minimal_config_gets_every_default():
    config = made({})
    assert isinstance(config.data, ArithmeticData)
    assert config.prm.optimizer == OptimizerSection(lr=1e-6, clip_grad=10.0)
    assert config.micro_batch.micro_batch_tokens == 8192


def test_kind_selects_the_dataclass():
    sft = {**PRIME, "kind": "sft", "sft": {"batch_size": 2, "optimizer": {"lr": 1}}}
    del sft["rollout"]
    assert isinstance(validate(AnyConfig, sft), SftConfig)
    assert made({"data": {"kind": "files", "train": ["a.jsonl"]}}).data == FileData(train=["a.jsonl"])


def test_partial_section_keeps_the_rest_of_its_own_default():
    assert made({"prm": {"optimizer": {"lr": 0.1}}}).prm.optimizer == OptimizerSection(lr=0.1, clip_grad=10.0)
    config = made({"prm": {"optimizer": {"weight_decay": 0.1}}, "policy": {"optimizer": {"clip_grad": 2}}})
    assert config.prm.optimizer == OptimizerSection(lr=1e-6, clip_grad=10.0, weight_decay=0.1)
    assert config.policy.optimizer == OptimizerSection(lr=5e-7, clip_grad=2.0, weight_decay=0.01)
    assert made({"micro_batch": {"packed": False}}).micro_batch.micro_batch_tokens == 8192


@pytest.mark.parametrize("value", [1, 1.0, "1", "1e0", "1.0"])
def test_numbers_are_taken_as_floats(value):
    config = made({"prm": {"beta": value}})
    assert type(config.prm.beta) is float
    assert config.prm.beta == 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prm": {"betta": 1}}, "prm.betta: unknown key; did you mean 'beta'?"),
        ({"evaluation": {"xyz": 1}}, "evaluation.xyz: unknown key; known keys: every_steps, num_prompts"),
        ({"rolout": {}}, "rolout: unknown key; did you mean 'rollout'?"),
        ({"run": {"name": "a"}}, "run.num_steps: missing"),
        ({1: 2}, "1: unknown key; known keys: kind, run"),
        ({"kind": None}, "kind: None is not a choice; choose one of 'prime', 'sft'"),
        ({"data": {"kind": ["files"]}}, "data.kind: ['files'] is not a choice"),
        ({"data": {"kind": "files", "train": [], "max_start": 1}}, "data.max_start: unknown key; known keys: kind, tr"),
        ({"verifier": {"code": {"mode": True}}}, "verifier.code.mode: True is not a choice; choose one of 'all_or_"),
        ({"data": {}}, "data.kind: missing; choose one of 'arithmetic', 'files'"),
        ({"data": {"kind": "file"}}, "data.kind: 'file' is not a choice (did you mean 'files'?)"),
        ({"data": [1]}, "data: expected a mapping of keys, got [1] (list)"),
        ({"data": {"kind": "files"}}, "data.train: missing"),
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
        ({"prm": {"loss": "dpo"}}, "prm.loss: 'dpo' is not a choice; choose one of 'cross_entropy', 'pairwise', '"),
        ({"prm": {"loss": "pairwize"}}, "prm.loss: 'pairwize' is not a choice (did you mean 'pairwise'?); choose one"),
        ({"prm": {"loss": "my-losses:dpo"}}, "prm.loss: 'my-losses:dpo' is not a choice"),
        ({"verifier": {"factory": "grading"}}, "verifier.factory: 'grading' must be package.module:function"),
        ({"data": {"kind": "own", "factory": "p.make"}}, "data.factory: 'p.make' must be package.module:function"),
        ({"data": {"kind": "own", "options": {}}}, "data.factory: missing"),
        ({"data": {"kind": "own", "factory": "a:b", "options": [1]}}, "data.options: expected a mapping of keys"),
        (
            {"run": {"name": "a", "num_steps": 3, "loggers": ["tensorbord"]}},
            "run.loggers[0]: 'tensorbord' is not a choice (did you mean 'tensorboard'?)",
        ),
        ({"prm": {"loss": 3}}, "prm.loss: expected text (put it in quotes), got 3 (int)"),
        ({"prm": {"optimizer": {"beta1": 0.9}}}, "prm.optimizer.beta1: unknown key; did you mean 'adam_beta1'?"),
        ({"rollout": {"num_prompts": 1, "stop_token_ids": [1.5]}}, "rollout.stop_token_ids[0]: expected a whole"),
    ],
)
def test_one_wrong_value(changes, expected):
    (problem,) = problems_of(changes)
    assert problem.startswith(expected)


def test_all_problems_are_found_in_one_pass():
    problems = problems_of(
        {
            "run": {"num_steps": "x"},
            "model": {},
            "data": {"kind": "files", "train": [1], "max_start": 3},
            "prm": {"beta": [], "lr": 1, "num_minibatches": 0},
            "extra": 1,
        }
    )
    assert sorted(problem.split(":")[0] for problem in problems) == [
        "data.max_start",
        "data.train[0]",
        "extra",
        "model.path",
        "prm.beta",
        "prm.lr",
        "prm.num_minibatches",
        "run.name",
        "run.num_steps",
    ]


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
