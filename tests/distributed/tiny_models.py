"""Tiny random models of every family, saved as Hugging Face folders with real config files' settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.mcore.parallel import Layout
from megatron_prime.mcore.role import RoleSetup
from megatron_prime.weights.architecture import read_architecture

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

_EXPERTS = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES = ("qwen2", "qwen2_untied", "qwen3", "llama", "llama31")
FAMILIES_WITH_EXPERTS = ("qwen3_moe", "qwen2_moe")


def save_tiny_model(family: str, folder: Path) -> Path:
    """Writes a model of a family; biases and norms are random too, so that no mix-up can hide."""
    torch.manual_seed(7)
    if family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE | _EXPERTS, head_dim=16, norm_topk_prob=True))
    elif family == "qwen2_moe":
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SHAPE | _EXPERTS, shared_expert_intermediate_size=40))
    elif family.startswith("qwen2"):
        config = Qwen2Config(**_SHAPE, tie_word_embeddings=family == "qwen2", rms_norm_eps=1e-6)
        model = Qwen2ForCausalLM(config)
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6))
    else:
        rope = {"rope_theta": 500000.0, "rope_type": "default"}
        if family == "llama31":
            rope = {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        model = LlamaForCausalLM(
            LlamaConfig(**_SHAPE, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters=rope)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def role_setup(folder: Path, dtype: Any, parallel: ParallelSection, layout: Layout) -> RoleSetup:
    """What a model of a tiny folder is built from."""
    return RoleSetup(
        architecture=read_architecture(folder),
        # Other tensor-parallel sizes have another number of padded rows.
        model=ModelSection(path=str(folder), dtype=dtype, make_vocab_size_divisible_by=16),
        parallel=parallel,
        micro_batch=MicroBatchSection(micro_batch_tokens=50),
        layout=layout,
    )
