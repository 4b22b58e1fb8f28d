"""Math and code prompts in one run: a real model's answers, programs that really run, rewards that reach the update."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from small_task import run_prime, write_yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from megatron_prime.assembly import run as build
from megatron_prime.config.loader import load_config
from megatron_prime.config.schema_verifier import CodeVerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.code.verifier import choose_isolation

RIGHT, WRONG = 7, 8
NUM_STEPS = 16
QUESTIONS = {"math": "\\boxed{{{}}}", "code": "```python\nprint({})\n```"}
TRUTHS = {"math": str(RIGHT), "code": json.dumps({"inputs": [""], "outputs": [str(RIGHT)]})}
STATUSES = (
    ("correct", "wrong", "no_answer", "malformed", "too_long"),
    ("pass", "wrong_answer", "runtime_error", "compile_error", "no_code"),
)
PLAIN = {"kind": "files", "template": "raw", "system_prompt": "none", "task_suffix": False, "max_prompt_tokens": 64}


def make_model_folder(folder: Path) -> Path:
    """The shape of a model that has a token for every byte."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(symbols),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=len(symbols) - 1,
    ).save_pretrained(folder)
    return folder


def make_start(root: str) -> str:
    """A model that answers both questions, right about half of the time; returns its folder."""
    folder = Path(root)
    rows = [
        {"prompt": f"{ability} {number}?", "response": form.format(result)}
        for ability, form in QUESTIONS.items()
        for number in range(4)
        for result in (RIGHT, WRONG)
    ]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "kind": "sft",
        "run": {"name": "sft", "directory": root, "num_steps": 120, "plots": False},
        "model": {"path": str(make_model_folder(folder / "shape")), "init": "random"},
        "data": PLAIN | {"train": [str(folder / "sft.jsonl")], "max_response_tokens": 64},
        "sft": {"batch_size": 16, "optimizer": {"lr": 5e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 10}},
        "checkpoint": {"every_steps": 0},
    }
    build.run(load_config(write_yaml(folder / "sft.yaml", config)))
    return str(folder / "sft" / "hf")


def prime_config(start: str, directory: str) -> dict[str, Any]:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{ability} {number}?"}],
            "ability": ability,
            "reward_model": {"style": "rule", "ground_truth": truth},
        }
        for ability, truth in TRUTHS.items()
        for number in range(4)
    ]
    path = Path(directory) / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "run": {"name": "mixed", "directory": directory, "num_steps": NUM_STEPS, "seed": 3, "plots": False},
        "model": {"path": start},
        "parallel": {"world_size": 2},
        "data": PLAIN | {"train": [str(path)], "abilities": ["math", "code"]},
        "rollout": {"num_prompts": 8, "num_responses": 16, "max_response_tokens": 40},
        "filter": {"enabled": False},
        "prm": {"optimizer": {"lr": 1e-3}},
        "policy": {"optimizer": {"lr": 5e-4}},
        "evaluation": {"num_prompts": 0},
        "checkpoint": {"every_steps": 0},
    }


def test_math_and_code_in_one_run(gloo_pool, tmp_path: Path) -> None:
    try:
        choose_isolation(CodeVerifierSection())
    except VerifierError as error:
        pytest.skip(f"programs cannot be run on this machine: {error}")
    start = gloo_pool.run(1, make_start, str(tmp_path))[0]
    gloo_pool.run(2, run_prime, prime_config(start, str(tmp_path)))
    lines = (tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == NUM_STEPS
    for row in rows:
        shares = {name.removeprefix("verdict/"): share for name, share in row.items() if name.startswith("verdict/")}
        assert shares.pop("missing") == 0.0
        assert sum(shares.values()) == pytest.approx(1.0)
        math, code = (sum(shares.get(name, 0.0) for name in names) for names in STATUSES)
        assert math == code == 0.5
        # The reward of an answer is the status of its own verifier.
        assert row["rollout/accuracy"] == pytest.approx(shares.get("correct", 0.0) + shares.get("pass", 0.0))
        assert 0 < row["time/verdict_seconds/p50"] <= row["time/verdict_seconds/longest"] < 30
    first = rows[0]
    assert all(0.1 < first[f"verdict/{status}"] < 0.4 for status in ("correct", "wrong", "pass", "wrong_answer"))
    # Over seeds of both trainings the mean of the last four steps is 0.24 to 0.33 above the first.
    assert mean(row["rollout/accuracy"] for row in rows[-4:]) > first["rollout/accuracy"] + 0.05
