"""From a configuration to a finished run on one process: what it leaves, how it goes on, and what ends it early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import DATA, prime_config, small_model_folder, write_yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.assembly import run as assembly
from megatron_prime.batch import Prompt, Response
from megatron_prime.config import PrimeConfig
from megatron_prime.config.loader import load_config
from megatron_prime.config.schema import AnyConfig
from megatron_prime.errors import ConfigError, DataError, VerifierError
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.observe.run_folder import RunFolder
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

QUICK = {
    "run": {"num_steps": 2, "plots": False, "loggers": []},
    "rollout": {"num_prompts": 2, "num_responses": 2, "max_response_tokens": 4},
    "filter": {"enabled": False},
    "evaluation": {"num_prompts": 2},
    "policy": {"num_minibatches": 1},
    "prm": {"num_window_batches": 1},
    "checkpoint": {"every_steps": 1, "export_hf": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are noise, with the arithmetic tokenizer."""
    folder = small_model_folder(tmp_path_factory.mktemp("models") / "random")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


def config_of(directory: Path, model: Path, **sections: Any) -> PrimeConfig:
    merged = {key: QUICK.get(key, {}) | sections.get(key, {}) for key in QUICK | sections}
    content = prime_config(str(model), str(directory), "run", **merged)
    config = load_config(write_yaml(directory / "run.yaml", content))
    assert isinstance(config, PrimeConfig)
    return config


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_models_its_metrics_and_a_summary(tmp_path: Path, model: Path) -> None:
    summary = assembly.run(config_of(tmp_path, model))
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["num_steps"] == summary["num_steps"] == 2
    assert steps_of(folder) == [0, 1, 2]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    start = HfFolder(model)
    for name in ("hf", "hf_prm"):
        trained = HfFolder(folder / name)
        whole = tuple(slice(0, size) for size in start.shape("model.norm.weight"))
        assert not torch.equal(trained.fetch("model.norm.weight", whole), start.fetch("model.norm.weight", whole)), (
            f"{name} has trained"
        )
    assert (folder / "versions.json").exists() and json.loads((folder / "head.json").read_text())["backend"] == "torch"


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, checkpoint={"every_steps": 1, "export_hf": False})
    assembly.run(config)
    longer = replace(config, run=replace(config.run, num_steps=3))
    assembly.run(longer)
    assert steps_of(tmp_path / "run") == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"run\.resume"):
        assembly.run(replace(longer, run=replace(longer.run, resume="never")))


def test_a_run_without_process_rewards_has_no_prm(tmp_path: Path, model: Path) -> None:
    assembly.run(config_of(tmp_path, model, advantage={"process_coef": 0}, run={"num_steps": 1}))
    folder = tmp_path / "run"
    assert (folder / "hf").is_dir() and not (folder / "hf_prm").exists()
    assert not any("prm/" in key for key in json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))


def test_a_supervised_run_learns_its_examples(tmp_path: Path, model: Path) -> None:
    content = {
        "kind": "sft",
        "run": {"name": "run", "directory": str(tmp_path), "num_steps": 20, "plots": False, "loggers": []},
        "model": {"path": str(model)},
        "data": DATA,
        "sft": {"batch_size": 8, "log_every_steps": 10, "optimizer": {"lr": 5e-3}},
        "checkpoint": {"every_steps": 0},
    }
    config: AnyConfig = load_config(write_yaml(tmp_path / "sft.yaml", content))
    assembly.run(config)
    losses = [json.loads(line)["sft/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()


def test_models_are_not_moved_off_a_gpu_that_is_not_there(tmp_path: Path, model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"parallel\.offload_idle: all moves models off a GPU, and there is none"):
        assembly.run(config_of(tmp_path, model, parallel={"offload_idle": "all"}))


def test_wrong_rows_show_before_anything_is_made(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"nothing": "known"}\n')
    data = {"kind": "files", "train": [str(tmp_path / "rows.jsonl")], "template": "raw", "max_prompt_tokens": 16}
    content = prime_config(str(model), str(tmp_path), "run", **QUICK) | {"data": data}
    config = load_config(write_yaml(tmp_path / "run.yaml", content | {"evaluation": {"num_prompts": 0}}))
    with pytest.raises(DataError, match="unknown layout"):
        assembly.run(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_role_may_have_micro_batches_and_a_shape_of_its_own(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model)
    other = small_model_folder(tmp_path / "other", hidden_size=32)
    with parallel_layout(config.parallel, 1) as layout:
        setup = assembly.role_setup(config, read_architecture(model), layout, RunFolder(tmp_path, "run"))
        own = assembly._setup_of(setup, 77, str(other))
    assert (own.micro_batch.micro_batch_tokens, own.micro_batch.micro_batch_size) == (77, None)
    assert own.architecture.hidden_size == 32 and setup.architecture.hidden_size == 64
    assert assembly._setup_of(setup, None) is setup


def test_the_verifier_knows_the_abilities_of_the_data(tmp_path: Path, model: Path) -> None:
    prompt = Prompt(prompt_id="p", text="", token_ids=(1,), ground_truth="4")
    response = Response(text=r"\boxed{4}", token_ids=(1,), logprobs=(0.0,), finish_reason="stop", weight_version=0)
    with assembly.configured_verifier(config_of(tmp_path, model)) as verifier:
        assert verifier.verify([(prompt, response)])[0].reward == 1.0
        with pytest.raises(VerifierError, match="code"):
            verifier.verify([(replace(prompt, ability="code"), response)])
