"""Every wrong value is reported with its full key path, all at once."""

import pytest
from schema_values import PRIME, made, problems_of

from megatron_prime.config.schema import AnyConfig, FileData, SftConfig
from megatron_prime.config.validation import validate


def test_kind_selects_the_dataclass():
    sft = {**PRIME, "kind": "sft", "sft": {"batch_size": 2, "optimizer": {"lr": 1}}}
    del sft["rollout"]
    assert isinstance(validate(AnyConfig, sft), SftConfig)
    assert made({"data": {"kind": "files", "train": ["a.jsonl"]}}).data == FileData(train=["a.jsonl"])


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
