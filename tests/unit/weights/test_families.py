from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.families import Sharding, weight_specs


def test_table_names_exactly_what_transformers_saves(model_folder: Path) -> None:
    specs = weight_specs(read_architecture(model_folder))
    ours = {name: shape for spec in specs for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)}
    with safe_open(model_folder / "model.safetensors", framework="pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert ours == theirs
    assert len({spec.megatron_name for spec in specs}) == len(specs)


def test_order_stages_and_layers(model_folders: dict[str, Path]) -> None:
    specs = weight_specs(read_architecture(model_folders["qwen2-untied"]))
    assert [(spec.megatron_name, spec.sharding, spec.stage, spec.layer) for spec in specs] == [
        ("embedding.word_embeddings.weight", Sharding.VOCAB, "embedding", None),
        *(
            (f"decoder.layers.{layer}.{name}", sharding, "layer", layer)
            for layer in range(2)
            for name, sharding in [
                ("input_layernorm.weight", Sharding.REPLICATED),
                ("self_attention.linear_qkv.weight", Sharding.QKV),
                ("self_attention.linear_qkv.bias", Sharding.QKV_BIAS),
                ("self_attention.linear_proj.weight", Sharding.ROW),
                ("pre_mlp_layernorm.weight", Sharding.REPLICATED),
                ("mlp.linear_fc1.weight", Sharding.GATE_UP),
                ("mlp.linear_fc2.weight", Sharding.ROW),
            ]
        ),
        ("decoder.final_layernorm.weight", Sharding.REPLICATED, "head", None),
        ("output_layer.weight", Sharding.VOCAB, "head", None),
    ]


def test_qwen3_has_norms_of_query_and_key(model_folders: dict[str, Path]) -> None:
    specs = {spec.megatron_name: spec for spec in weight_specs(read_architecture(model_folders["qwen3-tied"]))}
    assert specs["decoder.layers.1.self_attention.q_layernorm.weight"].hf_names == (
        "model.layers.1.self_attn.q_norm.weight",
    )
    assert specs["decoder.layers.1.self_attention.k_layernorm.weight"].hf_shapes == ((16,),)
    assert "decoder.layers.1.self_attention.linear_qkv.bias" not in specs
    assert "output_layer.weight" not in specs


@pytest.mark.parametrize(
    ("local", "fused"),
    [
        ("decoder.layers.1.input_layernorm.weight", "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "decoder.layers.0.self_attention.q_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)
def test_transformer_engine_name(model_folders: dict[str, Path], local: str, fused: str) -> None:
    specs = weight_specs(read_architecture(model_folders["qwen3-untied"]))
    assert {spec.megatron_name: spec.transformer_engine_name for spec in specs}[local] == fused


def test_experts(model_folders: dict[str, Path]) -> None:
    specs = {spec.megatron_name: spec for spec in weight_specs(read_architecture(model_folders["qwen2-moe"]))}
    expert = specs["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"]
    assert (expert.layer, expert.expert, expert.is_whole, expert.sharding) == (1, 2, True, Sharding.GATE_UP)
    assert expert.hf_names == (
        "model.layers.1.mlp.experts.2.gate_proj.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
    )
    shared = specs["decoder.layers.1.mlp.shared_experts.linear_fc1.weight"]
    assert (shared.expert, shared.is_whole) == (None, False)
    # Transformer Engine fuses no norm in front of a router.
    norm = specs["decoder.layers.1.pre_mlp_layernorm.weight"]
    assert norm.transformer_engine_name == norm.megatron_name
