"""The way of a real model through the command line: convert, train on GSM8K, export, evaluate, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_configs import GSM8K, PUBLISHED, make_start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prime.commands.main import main

TWO_RANKS = {"world_size": 2, "tensor_model_parallel_size": 2}
PARALLEL = {"qwen2.5-7b": TWO_RANKS}
DTYPES = {"llama-3.1-8b": "bfloat16"}


def prime_config(start: Path, family: str) -> dict[str, Any]:
    return {
        "run": {"name": "run", "directory": str(start.parent), "num_steps": 2, "plots": False},
        "model": {"path": str(start), "dtype": DTYPES.get(family, "float32")},
        "parallel": PARALLEL.get(family, {}),
        "data": {
            "kind": "files",
            "train": [str(GSM8K / "train.jsonl")],
            "evaluation": [str(GSM8K / "test.jsonl")],
        },
        "rollout": {"num_prompts": 2, "num_responses": 2, "max_response_tokens": 6},
        "filter": {"enabled": False},
        # The first step's process rewards are zero: PRM and reference start equal.
        "prm": {"optimizer": {"lr": 1e-2}},
        "advantage": {"process_gate": "none"},
        "policy": {"optimizer": {"lr": 1e-2}},
        "evaluation": {"every_steps": 0, "num_prompts": 2},
        "checkpoint": {"every_steps": 0},
    }


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name].to(first[name].dtype)) for name in first)


@pytest.mark.parametrize("family", PUBLISHED)
def test_from_a_published_config_to_a_trained_model(family: str, tmp_path: Path, capfd) -> None:
    start = tmp_path / "start"
    published = make_start(family, start)
    megatron, back, trained = tmp_path / "megatron", tmp_path / "back", tmp_path / "run" / "hf"

    assert main(["convert", "to-megatron", str(start), str(megatron)]) == 0
    assert main(["convert", "to-hf", str(megatron), str(back)]) == 0
    assert (back / "model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == published

    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(prime_config(start, family)))  # JSON is YAML
    assert main(["check", str(config)]) == 0
    assert main(["train", str(config)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row.get("advantage/process_share") for row in rows} == {0: None, 1: 0.0, 2: 1.0}
    assert rows[-1]["policy/grad_norm"] > 0

    for folder in (trained, trained.with_name("hf_prm")):
        assert not same_weights(start, folder)
        kept = json.loads((folder / "config.json").read_text())
        assert kept == published | {"torch_dtype": DTYPES.get(family, "float32")}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1?"}], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert model(**ids).logits.isfinite().all()

    # The run's checkpoint says the same as its exported model.
    state = tmp_path / "run" / "checkpoints" / "step_00000002" / "policy"
    assert main(["convert", "to-hf", str(state), str(tmp_path / "from-state"), "--like", str(start)]) == 0
    assert same_weights(trained, tmp_path / "from-state")

    capfd.readouterr()
    assert main(["evaluate", str(config), f"model.path={trained}"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["num_prompts"] == 2 and result["num_missing"] == 0 and 0 <= result["accuracy"] <= 1
    questions = ["How much is 3 times 4?", "And 5 less?"]
    assert main(["generate", str(trained), *questions, "--max-tokens", "5", "--num-responses", "2"]) == 0
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == [questions[0]] * 2 + [questions[1]] * 2
    assert answers[0] == answers[1]  # greedy
    assert {answer["finish_reason"] for answer in answers} <= {"stop", "length"}
