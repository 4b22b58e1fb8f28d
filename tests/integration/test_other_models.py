"""A PRM of another shape than the policy, and what its reference must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import prime_config, small_model_folder, write_yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.assembly import run as build
from megatron_prime.config.loader import load_config
from megatron_prime.errors import ConfigError


def random_model(folder: Path, **shape: Any) -> Path:
    """The arithmetic tokenizer and random weights."""
    small_model_folder(folder)
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a smaller model."""
    root = tmp_path_factory.mktemp("models")
    smaller = random_model(root / "smaller", hidden_size=32, intermediate_size=48)
    return random_model(root / "policy"), smaller


def run(directory: Path, policy: Path, **sections: Any) -> list[dict[str, Any]]:
    """Two steps on noise; returns the rows of the metrics."""
    shared: dict[str, Any] = {
        "run": {"num_steps": 2, "plots": False},
        "rollout": {"num_prompts": 2, "num_responses": 2, "max_response_tokens": 6},
        "filter": {"min_accuracy": 0, "max_accuracy": 1, "max_attempts": 1},
        "evaluation": {"num_prompts": 0},
        "prm": {"num_window_batches": 1, "optimizer": {"lr": 1e-2}},
        "policy": {"num_minibatches": 1},
    }
    merged = {key: shared.get(key, {}) | sections.get(key, {}) for key in shared | sections}
    config = prime_config(str(policy), str(directory), "run", **merged)
    build.run(load_config(write_yaml(directory / "run.yaml", config)))
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", ["sft", "policy"])
def test_a_smaller_prm_trains_and_is_exported(tmp_path: Path, models, source: str) -> None:
    policy, smaller = models
    reference = {"source": source} | ({"path": str(smaller)} if source == "sft" else {})
    prm = {"path": str(smaller), "num_window_batches": 1, "optimizer": {"lr": 1e-2}}
    rows = run(tmp_path, policy, prm=prm, reference=reference, parallel={"offload_idle": "gradients"})
    assert len(rows) == 2 and all(row["prm/grad_norm"] > 0 for row in rows)
    if source == "sft":
        # It starts as its own reference, where every response has the logit 0.
        assert rows[0]["prm/fresh_loss"] == pytest.approx(0.6931, abs=1e-3)
    shapes = {name: json.loads((tmp_path / "run" / name / "config.json").read_text()) for name in ("hf", "hf_prm")}
    assert (shapes["hf"]["hidden_size"], shapes["hf_prm"]["hidden_size"]) == (64, 32)
    exported = Qwen2ForCausalLM.from_pretrained(tmp_path / "run" / "hf_prm")
    start = Qwen2ForCausalLM.from_pretrained(smaller)
    assert not torch.equal(exported.model.norm.weight, start.model.norm.weight)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, models) -> None:
    policy, smaller = models
    with pytest.raises(ConfigError, match=r"^reference\.path: missing; prm\.path .*smaller has another shape"):
        run(tmp_path, policy, prm={"path": str(smaller)})
    other = random_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<another>"] = len(tokenizer["model"]["vocab"]) + 1
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"^prm\.path: .*other has another tokenizer"):
        run(tmp_path, policy, prm={"path": str(other)})
    with pytest.raises(ConfigError, match=r"query groups.*are not divisible by 2; use a divisor \(prm\.path"):
        odd = random_model(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
        run(
            tmp_path,
            policy,
            prm={"path": str(odd)},
            parallel={"world_size": 2, "tensor_model_parallel_size": 2},
        )
    with pytest.raises(ConfigError, match=r"parallel\.offload_idle: all moves models off a GPU"):
        run(tmp_path, policy, parallel={"offload_idle": "all"})
