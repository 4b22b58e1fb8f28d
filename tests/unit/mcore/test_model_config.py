"""Megatron's configuration of a model, where the CPU's tests of whole models cannot tell one choice from another."""

from __future__ import annotations

import pytest

from megatron_prime.config.schema import ModelSection, ParallelSection
from megatron_prime.mcore.cpu import megatron_platform
from megatron_prime.weights.architecture import ModelArchitecture

with megatron_platform():
    from megatron_prime.mcore.model import transformer_config

ARCHITECTURE = ModelArchitecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=128,
    vocab_size=100,
    max_position_embeddings=128,
    rotary_base=10000.0,
    layernorm_epsilon=1e-6,
    add_qkv_bias=False,
    qk_layernorm=False,
    tied_embeddings=False,
    rope_scaling=None,
    hf_config={},
)


@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_fp8_scales_need_no_history_and_no_other_rank(fp8) -> None:
    with megatron_platform():
        config = transformer_config(
            ARCHITECTURE,
            ModelSection(path="", dtype="bfloat16", fp8=fp8),
            ParallelSection(world_size=2),
            transformer_engine=False,
        )
    assert (config.fp8, config.fp8_recipe) == (fp8, "tensorwise")
