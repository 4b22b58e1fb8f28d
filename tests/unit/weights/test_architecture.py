import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import (
    ExpertLayers,
    Llama3RopeScaling,
    ModelArchitecture,
    read_architecture,
)

QWEN25_7B: dict[str, Any] = {  # as published, without keys that do not matter here
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_06B: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_06B | {
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
QWEN15_MOE_A27B: dict[str, Any] = QWEN25_7B | {
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "vocab_size": 151936,
}
LLAMA32_1B: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
LLAMA2_7B: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def read(folder: Path, config: Any) -> ModelArchitecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def problems(folder: Path, config: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        read(folder, config)
    return str(caught.value)


def test_qwen25_7b(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN25_7B) == ModelArchitecture(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=32768,
        rotary_base=1e6,
        rope_scaling=None,
        layernorm_epsilon=1e-6,
        tied_embeddings=False,
        add_qkv_bias=True,
        qk_layernorm=False,
        hf_config={},
    )


def test_qwen3_06b(tmp_path: Path) -> None:
    architecture = read(tmp_path, QWEN3_06B)
    assert (architecture.family, architecture.kv_channels, architecture.num_query_groups) == ("qwen3", 128, 8)
    assert architecture.qk_layernorm and not architecture.add_qkv_bias and architecture.tied_embeddings
    assert architecture.rotary_base == 1e6 and isinstance(architecture.rotary_base, float)


def test_experts(tmp_path: Path) -> None:
    architecture = read(tmp_path, QWEN3_30B_A3B)
    assert architecture.qk_layernorm and not architecture.add_qkv_bias
    assert architecture.experts == ExpertLayers(
        num_experts=128, router_topk=8, normalize_weights=True, ffn_hidden_size=768, shared_ffn_hidden_size=None
    )
    architecture = read(tmp_path, QWEN15_MOE_A27B)
    assert architecture.add_qkv_bias and not architecture.qk_layernorm and architecture.kv_channels == 128
    assert architecture.experts == ExpertLayers(
        num_experts=60, router_topk=4, normalize_weights=False, ffn_hidden_size=1408, shared_ffn_hidden_size=5632
    )


def test_llama32_1b(tmp_path: Path) -> None:
    architecture = read(tmp_path, LLAMA32_1B)
    assert architecture.rope_scaling == Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert not architecture.qk_layernorm and not architecture.add_qkv_bias and architecture.tied_embeddings


def test_llama2_defaults(tmp_path: Path) -> None:
    architecture = read(tmp_path, LLAMA2_7B)
    assert architecture.rotary_base == 10000.0 and architecture.rope_scaling is None
    assert architecture.kv_channels == 128
    without_groups = {k: v for k, v in LLAMA2_7B.items() if k != "num_key_value_heads"}
    assert read(tmp_path, without_groups).num_query_groups == 32


@pytest.mark.parametrize("config", [QWEN25_7B, QWEN3_06B, LLAMA32_1B])
def test_both_spellings_of_rope_agree(tmp_path: Path, config: dict[str, Any]) -> None:
    old = read(tmp_path, config)
    plain = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    new = read(tmp_path, plain | {"rope_parameters": {"rope_theta": config["rope_theta"], **scaling}})
    assert new == old


def test_reads_what_transformers_writes(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    architecture = read_architecture(str(model_folder))
    assert architecture.hf_config == config
    assert architecture.hidden_size == config["hidden_size"]
    assert architecture.num_query_groups == config["num_key_value_heads"]
    assert architecture.tied_embeddings == config["tie_word_embeddings"]
    assert architecture.rotary_base == config["rope_parameters"]["rope_theta"]
    assert (architecture.rope_scaling is not None) == ("llama3" in model_folder.name)


def test_raw_config_is_no_part_of_equality_or_repr(tmp_path: Path) -> None:
    architecture = read(tmp_path, QWEN25_7B)
    other = replace(architecture, hf_config={})
    assert architecture == other and hash(architecture) == hash(other)
    assert "hf_config" not in repr(architecture)


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (QWEN25_7B, {"model_type": "mixtral"}, "model_type: 'mixtral' is not supported"),
        (QWEN25_7B, {"model_type": None}, "model_type: None is not supported"),
        (QWEN25_7B, {"use_sliding_window": True}, "use_sliding_window: True is not supported"),
        (QWEN25_7B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: only"),
        (QWEN25_7B, {"layer_types": 5}, "layer_types: 5 is not a list"),
        (QWEN25_7B, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        (QWEN25_7B, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: "),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type: 'yarn' is not supported"),
        (QWEN25_7B, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.rope_type: 'linear' is not supported"),
        (QWEN25_7B, {"rope_scaling": LLAMA32_1B["rope_scaling"]}, "rope_scaling.rope_type: 'llama3' is not supported"),
        (QWEN25_7B, {"rope_scaling": {}, "rope_parameters": {}}, "rope_scaling: set together with rope_parameters"),
        (QWEN25_7B, {"rope_scaling": "none"}, "rope_scaling: 'none' is not an object"),
        (QWEN25_7B, {"rope_theta": None}, "rope_theta: missing"),
        (QWEN25_7B, {"rope_theta": None, "rope_parameters": {}}, "rope_theta: missing"),
        (QWEN25_7B, {"rms_norm_eps": "tiny"}, "rms_norm_eps: 'tiny' is not a positive number"),
        (QWEN25_7B, {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a positive number"),
        (QWEN25_7B, {"num_hidden_layers": True}, "num_hidden_layers: True is not a positive integer"),
        (QWEN25_7B, {"num_hidden_layers": 0}, "num_hidden_layers: 0 is not a positive integer"),
        (QWEN25_7B, {"vocab_size": 1.5}, "vocab_size: 1.5 is not a positive integer"),
        (QWEN25_7B, {"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is not true or false"),
        (QWEN25_7B, {"num_key_value_heads": 3}, "num_attention_heads: 28 is not a multiple of num_key_value_heads 3"),
        (QWEN25_7B, {"num_key_value_heads": None}, "num_key_value_heads: missing"),
        (QWEN25_7B, {"hidden_size": 3585}, "hidden_size: 3585 is not a multiple of num_attention_heads 28"),
        (QWEN3_06B, {"head_dim": None}, "head_dim: missing"),
        (QWEN3_06B, {"attention_bias": True}, "attention_bias: True is not supported"),
        (LLAMA32_1B, {"attention_bias": True}, "attention_bias: True is not supported"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 is not supported: every layer must have"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}, "mlp_only_layers: [0] is not supported: every layer must have"),
        (QWEN3_30B_A3B, {"num_experts": None}, "num_experts: missing"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok: 129 is more than the 128 experts"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 1}, "norm_topk_prob: with one expert per token"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": None}, "moe_intermediate_size: missing"),
        (QWEN15_MOE_A27B, {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: 0 is not a pos"),
        (QWEN15_MOE_A27B, {"qkv_bias": False}, "qkv_bias: False is not supported"),
        (LLAMA32_1B, {"mlp_bias": True}, "mlp_bias: True is not supported"),
        (LLAMA32_1B, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor: missing"),
        (
            LLAMA32_1B,
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None},
            "partial_rotary_factor: 0.5",
        ),
    ],
)
def test_one_problem(tmp_path: Path, config: dict[str, Any], change: dict[str, Any], expected: str) -> None:
    message = problems(tmp_path, config | change)
    assert expected in message
    assert all(line.startswith(f"{tmp_path / 'config.json'}: ") for line in message.splitlines())


def test_all_problems_at_once_and_nothing_else(tmp_path: Path) -> None:
    config = {k: v for k, v in LLAMA32_1B.items() if k not in ("hidden_size", "num_attention_heads", "head_dim")}
    config |= {"hidden_act": "relu", "mlp_bias": True, "vocab_size": "many"}
    config["rope_scaling"] = {"rope_type": "llama3", "factor": -1, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    keys = [line.split(": ")[1] for line in problems(tmp_path, config).splitlines()]
    assert sorted(keys) == sorted(
        [
            "hidden_act",
            "mlp_bias",
            "num_attention_heads",
            "hidden_size",
            "rope_scaling.factor",
            "rope_scaling.original_max_position_embeddings",
            "vocab_size",
        ]
    )


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_not_a_json_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json: .*JSON"):
        read_architecture(tmp_path)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match=r"config\.json: cannot be read"):
        read_architecture(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json: not found"):
        read_architecture(tmp_path / "nowhere")


@given(
    vocab_size=st.integers(1, 10**6),
    divisible_by=st.integers(1, 256),
    tp_size=st.sampled_from([1, 2, 4, 8]),
)
def test_padded_vocab_size_is_the_next_multiple(vocab_size: int, divisible_by: int, tp_size: int) -> None:
    architecture = ModelArchitecture(
        family="llama",
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=8,
        vocab_size=vocab_size,
        max_position_embeddings=8,
        rotary_base=1e4,
        rope_scaling=None,
        layernorm_epsilon=1e-5,
        tied_embeddings=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        hf_config={},
    )
    padded = architecture.padded_vocab_size(divisible_by, tp_size)
    assert padded % (divisible_by * tp_size) == 0
    assert vocab_size <= padded < vocab_size + divisible_by * tp_size
