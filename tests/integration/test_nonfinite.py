"""Losses, gradients and weights that are infinite or no numbers: seen before a step, kept, replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_task import prime_config, small_model_folder, write_yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.assembly import run as build
from megatron_prime.commands.main import main
from megatron_prime.config.loader import load_config
from megatron_prime.errors import NonFiniteError, TrainingError
from megatron_prime.observe.failed_updates import read_failed_update

NUM_STEPS = 3


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are noise, with the arithmetic tokenizer."""
    folder = small_model_folder(tmp_path_factory.mktemp("models") / "random")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


def train(directory: Path, model: Path, **sections: Any) -> dict[str, Any]:
    """A run of three steps on noise, all of which is kept; returns the metrics of its last row."""
    shared: dict[str, Any] = {
        "run": {"num_steps": NUM_STEPS, "plots": False},
        "rollout": {"num_prompts": 2, "num_responses": 2, "max_response_tokens": 6},
        "filter": {"min_accuracy": 0, "max_accuracy": 1, "max_attempts": 1},
        "evaluation": {"num_prompts": 0},
        "checkpoint": {"every_steps": 1, "export_hf": False},
        "prm": {"num_window_batches": 1},
        "policy": {"num_minibatches": 1},
    }
    merged = {key: shared.get(key, {}) | sections.get(key, {}) for key in shared | sections}
    config = prime_config(str(model), str(directory), "run", **merged)
    build.run(load_config(write_yaml(directory / "run.yaml", config)))
    rows = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads(rows[-1])


def test_an_infinite_coefficient_stops_before_anything_changes(tmp_path, random_model, capsys) -> None:
    with pytest.raises(NonFiniteError, match=r"policy update of step 1: not finite: loss nan") as caught:
        train(tmp_path, random_model, advantage={"outcome_coef": 1e39, "whiten": False})
    file = tmp_path / "run" / "failures" / "step_00000001_policy.pt"
    assert str(caught.value).endswith(f"megatron-prime replay {file}")
    failed = read_failed_update(file)
    assert failed.update.batch.rollout.num_responses == 4
    assert failed.update.batch.policy_logprobs.isfinite().all()
    assert not failed.update.advantages.isfinite().all()
    assert failed.config.advantage.outcome_coef == 1e39
    capsys.readouterr()
    assert main(["replay", str(file)]) == 0
    text = capsys.readouterr().out
    assert f"{random_model}, the start, 0 steps before the update" in text
    assert text.count("came in not finite: advantages") == 4
    assert text.rstrip().endswith("coefficients and weights first")


def test_replay_names_the_one_response_that_is_at_fault(tmp_path, random_model, capsys) -> None:
    with pytest.raises(NonFiniteError):
        train(tmp_path, random_model, advantage={"outcome_coef": 1e39, "whiten": False})
    file = tmp_path / "run" / "failures" / "step_00000001_policy.pt"
    content = torch.load(file, weights_only=True)
    content["update"]["advantages"] = torch.ones_like(content["update"]["advantages"])
    content["update"]["advantages"][2, 0] = 1e38
    torch.save(content, file)
    assert main(["replay", str(file), "--weights", "start"]) == 0
    text = capsys.readouterr().out
    # The advantage is finite, and so is the loss; the gradient's norm is not.
    assert "\nat fault: rows 2\nresponse 2 begins: " in text
    rows = json.loads(file.with_suffix(".json").read_text())["responses"]
    assert [row["grad_norm"] < 1e3 for row in rows] == [True, True, False, True]
    assert all(row["not_finite_before"] == [] for row in rows)


def test_steps_are_skipped_and_kept_up_to_a_limit(tmp_path, random_model) -> None:
    skip = {"on_nonfinite": "skip", "max_skipped_steps": 1, "lr": 1e-3}
    sections = {"advantage": {"outcome_coef": 1e39, "whiten": False}, "policy": {"optimizer": skip}}
    with pytest.raises(NonFiniteError, match=r"step 2.*the 1 optimizer steps before it were left out as well"):
        train(tmp_path, random_model, **sections)
    names = sorted(path.name for path in (tmp_path / "run" / "failures").glob("*.pt"))
    assert names == ["step_00000001_policy.pt", "step_00000002_policy.pt"]
    (row,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["policy/skipped"] == 1.0 and json.loads(row)["prm/skipped"] == 0.0
    assert json.loads(row)["policy/loss"] is None
    assert json.loads(row)["memory/policy_update_gib"] > 0


def test_a_learning_rate_that_destroys_the_weights_is_seen(tmp_path, random_model) -> None:
    with pytest.raises(TrainingError, match=r"prm update of step [12]: .*(not finite|no numbers)"):
        train(tmp_path, random_model, prm={"optimizer": {"lr": 1e30}})
    assert list((tmp_path / "run" / "failures").glob("step_*_prm.pt"))


def test_a_poisoned_weight_of_the_prm_is_seen_before_it_trains(tmp_path, random_model) -> None:
    poisoned = small_model_folder(tmp_path / "poisoned")
    weights = load_file(random_model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="prm update of step 1: not finite: loss nan"):
        train(tmp_path, random_model, prm={"path": str(poisoned)})
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
