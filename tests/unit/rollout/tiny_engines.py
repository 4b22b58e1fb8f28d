"""Tiny random models of every family, each as a config folder and as transformers' own model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_prime.batch import Prompt
from megatron_prime.rollout.embedded.engine import TransformersEngine

VOCAB_SIZE, MAX_POSITIONS = 23, 96
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.15,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False}
CONFIGS = {
    "qwen2_tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_untied": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 16}),
    "qwen3_moe": (Qwen3MoeConfig, {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen2_moe": (Qwen2MoeConfig, {**_EXPERTS, "shared_expert_intermediate_size": 20}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}


@dataclass(frozen=True)
class TinyModel:
    """A folder that holds only config.json, and the model whose weights the engine shall get."""

    folder: Path
    reference: PreTrainedModel

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        """The unique parameters under the names of published models."""
        if hasattr(self.reference.config, "num_experts"):  # stacked in memory, and not in files
            self.reference.save_pretrained(self.folder / "published")
            return list(load_file(self.folder / "published" / "model.safetensors").items())
        return [(name, parameter.detach()) for name, parameter in self.reference.named_parameters()]

    def engine(self, **changes: object) -> TransformersEngine:
        """An engine without weights; tokens decode to their numbers."""
        options = {"dtype": torch.float32, "device": "cpu", "end_token_ids": (1,), "decode": spell}
        options |= {"max_batch_size": 64} | changes
        return TransformersEngine(self.folder, **options)  # pyright: ignore[reportArgumentType]

    def loaded_engine(self, **changes: object) -> TransformersEngine:
        """An engine with the reference's weights as version 7."""
        engine = self.engine(**changes)
        engine.load_weights(iter(self.weights()), version=7)
        return engine


def spell(token_ids: Sequence[int]) -> str:
    """Stands in for a tokenizer."""
    return " ".join(map(str, token_ids))


def make_prompt(prompt_id: str, token_ids: Sequence[int]) -> Prompt:
    """A prompt of which only the tokens matter."""
    return Prompt(prompt_id=prompt_id, text="", token_ids=tuple(token_ids), ground_truth="")


def make_prompts(num_prompts: int, *, longest: int = 20, seed: int = 0) -> list[Prompt]:
    """Random prompts of 1 .. longest tokens, none of them the end token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_prompts,), generator=generator).tolist()
    return [
        make_prompt(f"p{i}", torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist())
        for i, length in enumerate(lengths)
    ]


def make_tiny_model(name: str, folder: Path) -> TinyModel:
    """Writes the folder of one of CONFIGS and draws its weights."""
    config_class, changes = CONFIGS[name]
    config = config_class(**(_SIZES | changes))
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        for parameter in model.parameters():  # biases and norms too, so that no mix-up can hide
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return TinyModel(folder, model)
