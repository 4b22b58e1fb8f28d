"""Every wrong configuration is refused before anything starts, with the key at fault and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prime.commands.main import main

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ["configs/prime_qwen2.5_32b.yaml", "model.path=configs/models/shapes/qwen2.5-32b"]
SFT = ["configs/arithmetic_sft.yaml"]

WRONG = {
    "unknown_key": (RECIPE, "rollout.num_prompt=8", "rollout.num_prompt", "did you mean 'num_prompts'"),
    "wrong_type": (RECIPE, "rollout.num_prompts=many", "rollout.num_prompts", "whole number"),
    "unknown_choice": (RECIPE, "advantage.estimator=ppo2", "advantage.estimator", "rloo"),
    "negative": (RECIPE, "prm.beta=-1", "prm.beta", "> 0"),
    "share_above_one": (RECIPE, "filter.max_accuracy=1.5", "filter.max_accuracy", "in [0, 1]"),
    "one_answer_per_prompt": (RECIPE, "rollout.num_responses=1", "rollout.num_responses", ">= 2"),
    "world_not_divisible": (RECIPE, "parallel.world_size=20", "parallel.world_size", "use a multiple of 16"),
    "heads_not_divisible": (
        RECIPE,
        "parallel.tensor_model_parallel_size=16",
        "parallel.tensor_model_parallel_size",
        "use a divisor",
    ),
    "layers_not_divisible": (
        RECIPE,
        "parallel.pipeline_model_parallel_size=3 parallel.world_size=24",
        "parallel.pipeline_model_parallel_size",
        "use a divisor",
    ),
    "sequence_parallel_alone": (
        RECIPE,
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel",
        "parallel.sequence_parallel=false",
    ),
    "two_micro_batch_sizes": (RECIPE, "micro_batch.micro_batch_size=2", "micro_batch.micro_batch_size", "exactly one"),
    "no_micro_batch_size": (
        RECIPE,
        "micro_batch.micro_batch_tokens=null",
        "micro_batch.micro_batch_tokens",
        "exactly one",
    ),
    "more_minibatches_than_groups": (
        RECIPE,
        "policy.num_minibatches=200",
        "policy.num_minibatches",
        "use fewer mini-batches or more prompts",
    ),
    "prm_minibatches": (RECIPE, "prm.num_minibatches=300", "prm.num_minibatches", "use fewer mini-batches"),
    "filter_keeps_nothing": (
        RECIPE,
        "filter.min_accuracy=0.3 filter.max_accuracy=0.4",
        "filter.min_accuracy",
        "widen the range",
    ),
    "filter_crossed": (RECIPE, "filter.min_accuracy=0.9", "filter.min_accuracy", "lower it"),
    "no_reward": (
        RECIPE,
        "advantage.outcome_coef=0 advantage.process_coef=0",
        "advantage.outcome_coef",
        "give outcomes or process rewards a weight",
    ),
    "warm_up_is_everything": (RECIPE, "prm.warmup_steps=600", "prm.warmup_steps", "lower it"),
    "lr_warm_up_too_long": (
        RECIPE,
        "policy.optimizer.lr_warmup_steps=99999",
        "policy.optimizer.lr_warmup_steps",
        "lower it",
    ),
    "answers_too_long": (
        RECIPE,
        "rollout.max_response_tokens=200000",
        "rollout.max_response_tokens",
        "131072",
    ),
    "random_start": (RECIPE, "model.init=random", "model.init", "megatron-prime sft"),
    "kl_at_a_temperature": (
        RECIPE,
        "policy.kl_coef=0.1 rollout.temperature=0.7",
        "policy.kl_coef",
        "set rollout.temperature=1",
    ),
    "unknown_file_format": (RECIPE, "data.train=[prompts.csv]", "data.train", ".parquet"),
    "no_evaluation_files": (RECIPE, "data.evaluation=[]", "data.evaluation", "evaluation.num_prompts=0"),
    "ability_without_verifier": (RECIPE, "data.abilities=[poetry]", "data.abilities", "math"),
    "stop_token": (RECIPE, "rollout.stop_token_ids=[999999]", "rollout.stop_token_ids", "152064 tokens"),
    "run_outside_its_folder": (RECIPE, "run.name=../elsewhere", "run.name", "use a plain name"),
    "no_such_model": (RECIPE, "model.path=nowhere", "model.path", "nowhere"),
    "engine_heads": (
        RECIPE,
        "rollout.vllm.tensor_parallel_size=3",
        "rollout.vllm.tensor_parallel_size",
        "use a divisor",
    ),
    "engine_wider_than_its_replica": (
        RECIPE,
        "parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=1",
        "rollout.vllm.tensor_parallel_size",
        "ranks of a replica",
    ),
    "engine_too_short": (
        RECIPE,
        "rollout.vllm.max_model_len=2048",
        "rollout.vllm.max_model_len",
        "4096",
    ),
    "more_replicas_than_examples": (SFT, "parallel.world_size=64", "sft.batch_size", "use 64 or more"),
    "operations_crossed": (SFT, "data.min_operations=9", "data.min_operations", "lower it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configs_are_refused(name: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    command, overrides, key, fix = WRONG[name]
    assert main(["check", "--shapes-only", *command, *overrides.replace(", ", ",").split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line.strip() for line in printed.err.splitlines()]
    assert lines[0] == "ConfigError:"
    (line,) = [line for line in lines if line.startswith(f"{key}:") and fix in line][:1] or [None]
    assert line is not None, lines
