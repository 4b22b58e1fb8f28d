"""The declarative table: which Hugging Face tensors make which Megatron tensor, and how it is laid out.

Qwen2, Qwen3 and Llama share their names and differ in which rows exist, so one table serves them all.
Import, export, conversion, refit and checksums derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from megatron_prime.weights.architecture import ModelArchitecture

Stage = Literal["embedding", "layer", "head"]


class Layout(StrEnum):
    """How a Megatron tensor is cut over tensor-parallel ranks."""

    COLUMN = "column"
    """By output rows (dim 0)."""
    ROW = "row"
    """By input columns (dim 1)."""
    QKV = "qkv"
    """By query groups; rows are, group after group, the group's query heads, its key head, its value head."""
    QKV_BIAS = "qkv_bias"
    """As `QKV`, for the vector."""
    GATE_UP = "gate_up"
    """Every rank holds its rows of the gate, then its rows of the up projection."""
    VOCAB = "vocab"
    """By vocabulary rows, after padding the vocabulary with zero rows."""
    REPLICATED = "replicated"
    """The same on every rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """One Megatron tensor and the Hugging Face tensors that it is made of."""

    megatron_name: str
    """Name in a model with local layers, with the layer's number in the whole model."""
    hf_names: tuple[str, ...]
    layout: Layout
    hf_shapes: tuple[tuple[int, ...], ...]
    """Shape of each of `hf_names`."""
    layer: int | None
    """Number in the whole model, None outside of layers."""
    stage: Stage


@dataclass(frozen=True, slots=True)
class _Row:
    megatron_name: str
    layout: Layout
    hf: Mapping[str, str]
    """Hugging Face name -> its dimensions, keys of `_dimensions`."""
    only_if: str | None = None
    """Flag of the architecture that the row needs."""


_EMBEDDING = (_Row("embedding.word_embeddings.weight", Layout.VOCAB, {"model.embed_tokens.weight": "vocab hidden"}),)

_LAYER = (
    _Row("input_layernorm.weight", Layout.REPLICATED, {"input_layernorm.weight": "hidden"}),
    _Row(
        "self_attention.linear_qkv.weight",
        Layout.QKV,
        {
            "self_attn.q_proj.weight": "query hidden",
            "self_attn.k_proj.weight": "key hidden",
            "self_attn.v_proj.weight": "key hidden",
        },
    ),
    _Row(
        "self_attention.linear_qkv.bias",
        Layout.QKV_BIAS,
        {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
        only_if="add_qkv_bias",
    ),
    _Row(
        "self_attention.q_layernorm.weight",
        Layout.REPLICATED,
        {"self_attn.q_norm.weight": "head"},
        only_if="qk_layernorm",
    ),
    _Row(
        "self_attention.k_layernorm.weight",
        Layout.REPLICATED,
        {"self_attn.k_norm.weight": "head"},
        only_if="qk_layernorm",
    ),
    _Row("self_attention.linear_proj.weight", Layout.ROW, {"self_attn.o_proj.weight": "hidden query"}),
    _Row("pre_mlp_layernorm.weight", Layout.REPLICATED, {"post_attention_layernorm.weight": "hidden"}),
    _Row(
        "mlp.linear_fc1.weight",
        Layout.GATE_UP,
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
    ),
    _Row("mlp.linear_fc2.weight", Layout.ROW, {"mlp.down_proj.weight": "hidden ffn"}),
)

_HEAD = (
    _Row("decoder.final_layernorm.weight", Layout.REPLICATED, {"model.norm.weight": "hidden"}),
    _Row("output_layer.weight", Layout.VOCAB, {"lm_head.weight": "vocab hidden"}, only_if="untied"),
)

_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def weight_specs(architecture: ModelArchitecture) -> list[WeightSpec]:
    """Every weight of the model, in the one order that all ranks and all streams follow.

    Args:
        architecture: the model.

    Returns:
        Specs from the embedding over the layers to the head; a tied head is the embedding and not listed.
    """
    sizes = _dimensions(architecture)
    flags = {
        "add_qkv_bias": architecture.add_qkv_bias,
        "qk_layernorm": architecture.qk_layernorm,
        "untied": not architecture.tied_embeddings,
        None: True,
    }

    def expand(rows: tuple[_Row, ...], stage: Stage, layer: int | None = None) -> list[WeightSpec]:
        megatron_prefix = "" if layer is None else f"decoder.layers.{layer}."
        hf_prefix = "" if layer is None else f"model.layers.{layer}."
        return [
            WeightSpec(
                megatron_name=megatron_prefix + row.megatron_name,
                hf_names=tuple(hf_prefix + name for name in row.hf),
                layout=row.layout,
                hf_shapes=tuple(tuple(sizes[dim] for dim in dims.split()) for dims in row.hf.values()),
                layer=layer,
                stage=stage,
            )
            for row in rows
            if flags[row.only_if]
        ]

    layers = [spec for layer in range(architecture.num_layers) for spec in expand(_LAYER, "layer", layer)]
    return expand(_EMBEDDING, "embedding") + layers + expand(_HEAD, "head")


def transformer_engine_name(megatron_name: str) -> str:
    """The name that a weight has in layers of Transformer Engine, which fuse norms into the next projection.

    Args:
        megatron_name: name in a model with local layers (`WeightSpec.megatron_name`).

    Returns:
        The name with Transformer Engine layers; the same for all but the two norms of a layer.
    """
    *layer, name = megatron_name.split(".", 3)  # decoder, layers, number, name in the layer
    return ".".join([*layer, _FUSED_NORMS.get(name, name)])


def _dimensions(architecture: ModelArchitecture) -> dict[str, int]:
    return {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "query": architecture.num_attention_heads * architecture.kv_channels,
        "key": architecture.num_query_groups * architecture.kv_channels,
        "head": architecture.kv_channels,
    }
