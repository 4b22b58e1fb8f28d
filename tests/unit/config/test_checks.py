"""Contradictions and arithmetic: one wrong thing at a time, then many at once."""

import json
from pathlib import Path

import pytest
from model_shape import SHAPE

from megatron_prime.config import (
    AnyConfig,
    check_config,
    load_config,
    raise_for_problems,
)
from megatron_prime.errors import ConfigError
from megatron_prime.planner.batch_plan import batch_plan

PRIME = """
run: {name: test, num_steps: 10}
model: {path: MODEL}
data: {kind: arithmetic}
rollout: {num_prompts: 8, num_responses: 4, max_response_tokens: 32}
"""
SFT = """
kind: sft
run: {name: test, num_steps: 10}
model: {path: MODEL, init: random}
data: {kind: arithmetic}
sft: {batch_size: 8, optimizer: {lr: 1e-3}}
"""


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def load(folder: Path, text: str, *overrides: str) -> AnyConfig:
    path = folder.parent / "config.yaml"
    path.write_text(text.replace("MODEL", str(folder)))
    return load_config(path, overrides)


def test_sound_configs_have_no_problems(model_folder):
    for text in (PRIME, SFT):
        config = load(model_folder, text)
        assert check_config(config, SHAPE) == []
        raise_for_problems(check_config(config))


ONE_PROBLEM = [
    # A layout that does not exist.
    (["parallel.world_size=6", "parallel.tensor_model_parallel_size=4"], "parallel.world_size: 6 is not divisible by"),
    (["parallel.world_size=3", "parallel.pipeline_model_parallel_size=2"], "parallel.world_size: 3 is not divisible"),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel: shards over tensor-parallel ranks"),
    (
        ["parallel.expert_model_parallel_size=2", "parallel.world_size=2"],
        "parallel.expert_model_parallel_size: the model has no experts",
    ),
    # What the layers are made of.
    (["model.fp8=hybrid"], "model.fp8: 'hybrid' needs model.dtype=bfloat16"),
    (
        ["model.transformer_impl=transformer_engine", "parallel.context_parallel_size=2", "parallel.world_size=2"],
        "model.transformer_impl: Transformer Engine has no context-parallel attention in float32",
    ),
    (
        ["model.fp8=e4m3", "model.dtype=bfloat16", "model.transformer_impl=local"],
        "model.fp8: 'e4m3' needs Transformer Engine",
    ),
    # Micro-batches.
    (["micro_batch.micro_batch_size=2"], "micro_batch.micro_batch_size: micro_batch.micro_batch_tokens is set too"),
    (["micro_batch.micro_batch_tokens=null"], "micro_batch.micro_batch_tokens: neither it nor"),
    # Names and places.
    (["run.name=''"], "run.name: '' is no folder below"),
    (["run.name=/tmp/x"], "run.name: '/tmp/x' is no folder below"),
    (["run.name=."], "run.name: '.' is no folder below"),
    (["run.name=a/./b"], "run.name: 'a/./b' is no folder below"),
    (["run.name=a/../../b"], "run.name: 'a/../../b' is no folder below"),
    (["model.path=nowhere"], "model.path: no such folder: nowhere"),
    (["prm.path=nowhere"], "prm.path: no such folder: nowhere"),
    # Three models that start equal and are compared.
    (["model.init=random"], "model.init: random would start policy, PRM and reference from different weights"),
    (["policy.kl_coef=0.1", "rollout.temperature=0.9"], "policy.kl_coef: compares the policy at rollout.temperature"),
    # Data.
    (["data.min_operations=5"], "data.min_operations: 5 is above data.max_operations = 4"),
    (["data={kind: files, train: []}", "evaluation.num_prompts=0"], "data.train: no files"),
    (["data={kind: files, train: ['hf:a:b']}"], "data.evaluation: no files, and evaluation.num_prompts is "),
    (["data={kind: files, train: [none.jsonl]}", "evaluation.num_prompts=0"], "data.train: no such file: none.jsonl"),
    (["data={kind: files, train: ['hf:a:b'], evaluation: [e.json]}"], "data.evaluation: no such file: e.json"),
    (["data={kind: files, train: [a.csv]}", "evaluation.num_prompts=0"], "data.train: 'a.csv' has an unknown format"),
    (["data={kind: files, train: ['hf:a']}", "evaluation.num_prompts=0"], "data.train: 'hf:a' is not a dataset"),
    (
        ["data={kind: files, train: ['hf:a:b'], abilities: [math, law]}", "evaluation.num_prompts=0"],
        "data.abilities: 'law' has no verifier",
    ),
    (["data={kind: files, train: ['hf:a:b'], abilities: []}", "evaluation.num_prompts=0"], "data.abilities: none"),
    # Parts of the user's own.
    (["data={kind: own, factory: 'a:b', abilities: [law]}"], "data.abilities: 'law' has no verifier"),
    (["data={kind: own, factory: 'a:b', max_prompt_tokens: 99999}"], "rollout.max_response_tokens: 99999 prompt + 32"),
    (["run.loggers=['a:b', wandb, 'a:b']"], "run.loggers: 'a:b' is named more than once"),
    # Groups and their filter.
    (["filter.min_accuracy=0.9"], "filter.min_accuracy: 0.9 is above filter.max_accuracy"),
    (["filter.min_accuracy=0.3", "filter.max_accuracy=0.4"], "filter.min_accuracy: no count of right answers out of"),
    (
        ["advantage.outcome_coef=0", "advantage.process_coef=0"],
        "advantage.outcome_coef: both coefficients are 0",
    ),
    # Mini-batches and optimizers.
    (["policy.num_minibatches=9"], "policy.num_minibatches: 9 mini-batches for 1 data-parallel replicas need 9 groups"),
    (["prm.num_minibatches=9"], "prm.num_minibatches: 9 mini-batches for 1 data-parallel replicas need 9 groups"),
    (
        ["policy.num_minibatches=4", "parallel.world_size=4"],
        "policy.num_minibatches: 4 mini-batches for 4 data-parallel replicas need 16 groups and"
        " rollout.num_prompts is 8",
    ),
    (["prm.num_minibatches=4", "parallel.world_size=4"], "prm.num_minibatches: 4 mini-batches for 4 data-parallel"),
    (
        ["advantage.estimator=grpo", "advantage.process_baseline=group"],
        "advantage.process_baseline: belongs to rloo and advantage.estimator is grpo",
    ),
    (
        ["advantage.process_gate=none", "advantage.gate_smoothing=0.9"],
        "advantage.gate_smoothing: has no effect while advantage.process_gate is none",
    ),
    (["prm.warmup_steps=10"], "prm.warmup_steps: 10 of run.num_steps = 10 steps leave none"),
    (
        ["policy.optimizer.min_lr=1", "policy.optimizer.lr_decay_style=cosine"],
        "policy.optimizer.min_lr: 1.0 is above policy.optimizer.lr",
    ),
    (["prm.optimizer.min_lr=1e-7"], "prm.optimizer.min_lr: has no effect on a constant learning rate"),
    (["prm.optimizer.lr_warmup_steps=11"], "prm.optimizer.lr_warmup_steps: 11 is above the run's 10 optimizer steps"),
    (
        ["prm.warmup_steps=5", "policy.optimizer.lr_warmup_steps=6"],
        "policy.optimizer.lr_warmup_steps: 6 is above the run's 5 optimizer steps",
    ),
    # The layout against the model's shape.
    (
        ["parallel.world_size=8", "parallel.tensor_model_parallel_size=8"],
        "parallel.tensor_model_parallel_size: the model's 4 query groups",
    ),
    (
        ["parallel.world_size=4", "parallel.pipeline_model_parallel_size=4"],
        "parallel.pipeline_model_parallel_size: the model's 6 layers are not divisible by 4",
    ),
    (["rollout.stop_token_ids=[127,128]"], "rollout.stop_token_ids: 128 is outside the model's vocabulary of 128"),
    (["rollout.max_response_tokens=2049"], "rollout.max_response_tokens: 0 prompt + 2049 response tokens are above"),
    (
        ["data={kind: files, train: ['hf:a:b'], evaluation: ['hf:a:b:c'], max_prompt_tokens: 2017}"],
        "rollout.max_response_tokens: 2017 prompt + 32 response tokens are above the model's 2048 positions",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), ONE_PROBLEM)
def test_one_problem_of_a_prime_run(model_folder, overrides, expected):
    problems = check_config(load(model_folder, PRIME, *overrides), SHAPE)
    assert len(problems) == 1, problems
    assert problems[0].startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.world_size=16"], "sft.batch_size: 8 is less than the data parallel size 16"),
        (["sft.optimizer.lr_warmup_steps=11"], "sft.optimizer.lr_warmup_steps: 11 is above the run's 10"),
        (["sft.optimizer.min_lr=1", "sft.optimizer.lr_decay_style=linear"], "sft.optimizer.min_lr: 1.0 is above"),
        (
            ["data={kind: files, train: [none.parquet], max_response_tokens: 9}"],
            "data.train: no such file: none.parquet",
        ),
        (
            ["data={kind: files, train: ['hf:a:b'], max_prompt_tokens: 1024, max_response_tokens: 1025}"],
            "data.max_response_tokens: 1024 prompt + 1025 response tokens are above",
        ),
    ],
)
def test_one_problem_of_an_sft_run(model_folder, overrides, expected):
    problems = check_config(load(model_folder, SFT, *overrides), SHAPE)
    assert len(problems) == 1, problems
    assert problems[0].startswith(expected)


def test_model_folders_must_hold_what_the_run_reads(model_folder):
    (model_folder / "model.safetensors").unlink()
    assert check_config(load(model_folder, SFT)) == []
    (problem,) = check_config(load(model_folder, PRIME))
    assert problem.startswith("model.path: ") and problem.endswith("has no *.safetensors; fetch the weights")
    (problem,) = check_config(load(model_folder, SFT, "model.init=weights"))
    assert problem.endswith("fetch the weights or set model.init=random")
    assert check_config(load(model_folder, PRIME), check_files=False) == []
    (model_folder / "config.json").unlink()
    (problem,) = check_config(load(model_folder, SFT))
    assert "no config.json" in problem


def test_settings_that_look_odd_but_mean_something(model_folder):
    sound = [
        ["reference.source=policy", f"prm.path={model_folder}"],
        ["advantage.process_coef=0", "prm.warmup_steps=50", "prm.num_minibatches=999", "prm.path=nowhere"],
        ["parallel.use_distributed_optimizer=true"],
        ["prm.update=before", "prm.num_window_batches=4"],
        ["policy.optimizer.clip_grad=0"],
        ["evaluation.every_steps=0", "evaluation.temperature=0"],
        ["micro_batch={micro_batch_size: 1, micro_batch_tokens: null}"],
        ["advantage.estimator=reinforce", "rollout.num_responses=2", "filter.enabled=false"],
        ["policy.kl_coef=0.1", "evaluation.temperature=0"],
        ["rollout.temperature=0.9"],
        ["policy.num_minibatches=2", "parallel.world_size=4"],
        ["data={kind: files, train: [FOLDER/rows.jsonl.gz]}", "evaluation.num_prompts=0"],
    ]
    (model_folder / "rows.jsonl.gz").touch()
    for overrides in sound:
        overrides = [text.replace("FOLDER", str(model_folder)) for text in overrides]
        assert check_config(load(model_folder, PRIME, *overrides), SHAPE) == [], overrides


def test_all_problems_come_together(model_folder):
    config = load(
        model_folder,
        PRIME,
        "parallel.world_size=3",
        "parallel.tensor_model_parallel_size=2",
        "run.name=..",
        "micro_batch.micro_batch_tokens=null",
        "model.path=nowhere",
        "filter.min_accuracy=0.9",
        "prm.warmup_steps=10",
    )
    problems = check_config(config, SHAPE)
    assert [problem.split(":")[0] for problem in problems] == [
        "run.name",
        "micro_batch.micro_batch_tokens",
        "model.path",
        "parallel.world_size",
        "filter.min_accuracy",
        "prm.warmup_steps",
    ]
    with pytest.raises(ConfigError) as caught:
        raise_for_problems(problems)
    assert caught.value.problems == tuple(problems)


def test_plan_counts_what_a_step_does(model_folder):
    overrides = [
        "parallel.world_size=8",
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "policy.num_minibatches=4",
        "policy.num_epochs=2",
        "prm.num_window_batches=3",
        "run.num_steps=5",
    ]
    rows = dict(batch_plan(load(model_folder, PRIME, *overrides)))
    assert rows["layout"] == "8 processes = 2 tensor x 2 pipeline x 2 data parallel"
    assert rows["rollouts"] == "8 prompts x 4 = 32 responses per step"
    assert rows["sampling"].startswith("at most 128 responses")
    assert rows["policy update"] == "8 optimizer steps per step, each of about 8 responses"
    assert rows["PRM update"] == "3 optimizer steps per step, each of about 32 responses (window of 3 batches)"
    assert rows["models"] == f"policy, PRM, frozen reference from {model_folder} (float32)"
    assert rows["run"] == "5 steps, 160 trained responses"


def test_plan_names_only_the_models_that_are_built(model_folder):
    def models(*overrides: str) -> str:
        return dict(batch_plan(load(model_folder, PRIME, *overrides)))["models"]

    assert models("advantage.process_coef=0") == f"policy from {model_folder} (float32)"
    assert models("advantage.process_coef=0", "policy.kl_coef=0.1").startswith("policy, frozen reference from")
    assert models("reference.source=policy").startswith("policy, PRM from")
    assert models("prm.path=other") == (
        f"policy from {model_folder}, PRM from other, frozen reference from {model_folder} (float32)"
    )
    rows = dict(batch_plan(load(model_folder, SFT)))
    assert rows["run"] == "10 optimizer steps, 80 examples"
    assert rows["micro-batches"] == "at most 8192 tokens, packed"
