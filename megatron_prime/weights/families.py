"""The declarative table: which Hugging Face tensors make which Megatron tensor, and how it is laid out.

All families share their names and differ in which rows exist, so one table serves them all.
Import, export, conversion, refit and checksums derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from megatron_prime.weights.architecture import ModelArchitecture

Stage = Literal["embedding", "layer", "head"]


class Sharding(StrEnum):
    """How a Megatron tensor is cut over tensor-parallel ranks."""

    COLUMN = "column"
    """By output rows (dim 0)."""
    ROW = "row"
    """By input columns (dim 1)."""
    QKV = "qkv"
    """By query groups; rows are, group after group, the group's query heads, its key head, its value head."""
    QKV_BIAS = "qkv_bias"
    """The same as `QKV`, for the bias vector."""
    GATE_UP = "gate_up"
    """Every rank holds its rows of the gate, then its rows of the up projection."""
    VOCAB = "vocab"
    """By vocabulary rows, after padding the vocabulary with zero rows."""
    REPLICATED = "replicated"
    """Not cut: every rank has all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """One Megatron tensor and the Hugging Face tensors that it is made of."""

    megatron_name: str
    """Name in a model with local layers, with the numbers of layer and expert in the whole model."""
    transformer_engine_name: str
    """Its name with layers of Transformer Engine, which fuse norms into the next projection."""
    hf_names: tuple[str, ...]
    sharding: Sharding
    hf_shapes: tuple[tuple[int, ...], ...]
    """Shape of each of `hf_names`."""
    layer: int | None
    """Number in the whole model, None outside of layers."""
    stage: Stage
    expert: int | None = None
    """Number in the whole layer, None outside of experts. Experts are divided over ranks, and never cut."""

    @property
    def is_whole(self) -> bool:
        """Whether ranks that hold any of it hold all of it."""
        return self.sharding is Sharding.REPLICATED or self.expert is not None


@dataclass(frozen=True, slots=True)
class _Row:
    megatron_name: str
    sharding: Sharding
    hf: Mapping[str, str]
    """Hugging Face name -> its dimensions, keys of `_dimensions`."""
    only_if: str | None = None
    """Flag of the architecture that the row needs."""
    fused_name: str | None = None
    """Megatron name with layers of Transformer Engine, where it is another one."""


_EMBEDDING = (_Row("embedding.word_embeddings.weight", Sharding.VOCAB, {"model.embed_tokens.weight": "vocab hidden"}),)

_ATTENTION = (
    _Row(
        "input_layernorm.weight",
        Sharding.REPLICATED,
        {"input_layernorm.weight": "hidden"},
        fused_name="self_attention.linear_qkv.layer_norm_weight",
    ),
    _Row(
        "self_attention.linear_qkv.weight",
        Sharding.QKV,
        {
            "self_attn.q_proj.weight": "query hidden",
            "self_attn.k_proj.weight": "key hidden",
            "self_attn.v_proj.weight": "key hidden",
        },
    ),
    _Row(
        "self_attention.linear_qkv.bias",
        Sharding.QKV_BIAS,
        {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
        only_if="add_qkv_bias",
    ),
    _Row(
        "self_attention.q_layernorm.weight",
        Sharding.REPLICATED,
        {"self_attn.q_norm.weight": "head"},
        only_if="qk_layernorm",
    ),
    _Row(
        "self_attention.k_layernorm.weight",
        Sharding.REPLICATED,
        {"self_attn.k_norm.weight": "head"},
        only_if="qk_layernorm",
    ),
    _Row("self_attention.linear_proj.weight", Sharding.ROW, {"self_attn.o_proj.weight": "hidden query"}),
)

_DENSE_MLP = (
    _Row(
        "pre_mlp_layernorm.weight",
        Sharding.REPLICATED,
        {"post_attention_layernorm.weight": "hidden"},
        fused_name="mlp.linear_fc1.layer_norm_weight",
    ),
    _Row(
        "mlp.linear_fc1.weight",
        Sharding.GATE_UP,
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
    ),
    _Row("mlp.linear_fc2.weight", Sharding.ROW, {"mlp.down_proj.weight": "hidden ffn"}),
)

_ROUTER = (
    _Row("pre_mlp_layernorm.weight", Sharding.REPLICATED, {"post_attention_layernorm.weight": "hidden"}),
    _Row("mlp.router.weight", Sharding.REPLICATED, {"mlp.gate.weight": "experts hidden"}),
)

_EXPERT = (
    _Row(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        Sharding.GATE_UP,
        {
            "mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
            "mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden",
        },
    ),
    _Row(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        Sharding.ROW,
        {"mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn"},
    ),
)

_SHARED_EXPERT = (
    _Row(
        "mlp.shared_experts.linear_fc1.weight",
        Sharding.GATE_UP,
        {
            "mlp.shared_expert.gate_proj.weight": "shared_ffn hidden",
            "mlp.shared_expert.up_proj.weight": "shared_ffn hidden",
        },
    ),
    _Row(
        "mlp.shared_experts.linear_fc2.weight",
        Sharding.ROW,
        {"mlp.shared_expert.down_proj.weight": "hidden shared_ffn"},
    ),
    _Row("mlp.shared_experts.gate_weight", Sharding.REPLICATED, {"mlp.shared_expert_gate.weight": "one hidden"}),
)

_HEAD = (
    _Row("decoder.final_layernorm.weight", Sharding.REPLICATED, {"model.norm.weight": "hidden"}),
    _Row("output_layer.weight", Sharding.VOCAB, {"lm_head.weight": "vocab hidden"}, only_if="untied"),
)


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

    def expand(
        rows: tuple[_Row, ...], stage: Stage, layer: int | None = None, expert: int | None = None
    ) -> list[WeightSpec]:
        megatron_prefix = "" if layer is None else f"decoder.layers.{layer}."
        hf_prefix = "" if layer is None else f"model.layers.{layer}."
        return [
            WeightSpec(
                megatron_name=megatron_prefix + row.megatron_name.format(expert=expert),
                transformer_engine_name=megatron_prefix + (row.fused_name or row.megatron_name).format(expert=expert),
                hf_names=tuple(hf_prefix + name.format(expert=expert) for name in row.hf),
                sharding=row.sharding,
                hf_shapes=tuple(tuple(sizes[dim] for dim in dims.split()) for dims in row.hf.values()),
                layer=layer,
                stage=stage,
                expert=expert,
            )
            for row in rows
            if flags[row.only_if]
        ]

    def feed_forward(layer: int) -> list[WeightSpec]:
        experts = architecture.experts
        if experts is None:
            return expand(_DENSE_MLP, "layer", layer)
        result = expand(_ROUTER, "layer", layer)
        for expert in range(experts.num_experts):
            result += expand(_EXPERT, "layer", layer, expert)
        return result if experts.shared_ffn_hidden_size is None else result + expand(_SHARED_EXPERT, "layer", layer)

    result = expand(_EMBEDDING, "embedding")
    for layer in range(architecture.num_layers):
        result += expand(_ATTENTION, "layer", layer) + feed_forward(layer)
    return result + expand(_HEAD, "head")


def _dimensions(architecture: ModelArchitecture) -> dict[str, int]:
    experts = architecture.experts
    if experts is None:
        sizes = {}
    else:
        sizes = {"experts": experts.num_experts, "expert_ffn": experts.ffn_hidden_size, "one": 1}
        sizes["shared_ffn"] = experts.shared_ffn_hidden_size or 0
    return sizes | {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "query": architecture.num_attention_heads * architecture.kv_channels,
        "key": architecture.num_query_groups * architecture.kv_channels,
        "head": architecture.kv_channels,
    }
