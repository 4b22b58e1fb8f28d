"""Bytes that the models of a run take on one rank: exact for tensors that live on, estimates for those that pass.

Formulas: parameters, gradients and optimizer states follow from the shapes (Megatron keeps float32 gradients, float32
masters of bfloat16 parameters and two float32 Adam moments; Rajbhandari et al., arXiv 1910.02054, section 3).
Activations follow Korthikanti et al., arXiv 2205.05198, section 4, for layers without dropout, with SwiGLU, grouped
keys and an attention that stores no scores; experts are taken to be chosen evenly.
`tests/distributed/test_planned_bytes.py` compares both with real dense models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_prime.config.schema import AnyConfig, ModelSection, ParallelSection, PrimeConfig
from megatron_prime.weights.architecture import ModelArchitecture

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = 4
LOGIT_TILE_BYTES = 8 * 2**20
"""Of the log-prob op (`kernels/tiles.py`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutSizes:
    """What of a configuration decides how a model lies on its ranks."""

    tensor: int
    pipeline: int
    context: int
    data: int
    """Replicas, each of tensor x pipeline x context ranks."""
    virtual: int
    """Parts of the model on a pipeline stage."""
    expert: int
    """Ranks that share out the experts of a layer."""
    sequence_parallel: bool
    distributed_optimizer: bool
    item_bytes: int
    """Of parameters and activations."""
    vocab_multiple: int
    recompute: str
    fp8: bool = False
    """Matrix products of the layers."""
    local_layers: bool = False
    """Megatron's own layers with torch's norm and attention; else Transformer Engine's."""
    on_cpu: bool = False
    """Activation functions in several steps; a GPU's are fused."""

    @classmethod
    def of(cls, config: AnyConfig, *, on_cpu: bool) -> LayoutSizes:
        """The layout of a configuration."""
        return cls.of_sections(config.model, config.parallel, on_cpu=on_cpu)

    @classmethod
    def of_sections(cls, model: ModelSection, parallel: ParallelSection, *, on_cpu: bool) -> LayoutSizes:
        """The layout of a configuration's two sections that have a say in it."""
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        return cls(
            tensor=tensor,
            pipeline=pipeline,
            context=parallel.context_parallel_size,
            data=parallel.world_size // (tensor * pipeline * parallel.context_parallel_size),
            virtual=parallel.virtual_pipeline_model_parallel_size or 1,
            expert=parallel.expert_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            distributed_optimizer=parallel.use_distributed_optimizer,
            item_bytes=ITEM_BYTES[model.dtype],
            vocab_multiple=model.make_vocab_size_divisible_by,
            recompute=model.recompute_granularity,
            fp8=model.fp8 is not None,
            local_layers=on_cpu
            or model.transformer_impl == "local"
            or (model.transformer_impl == "auto" and model.dtype == "float32"),
            on_cpu=on_cpu,
        )

    @property
    def norm_shards(self) -> int:
        """Ranks that share the tokens outside of the matrix products."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBytes:
    """Of one model on one rank."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def num_parameters(architecture: ModelArchitecture) -> int:
    """Parameters of the whole model without vocabulary padding; a tied head counts once."""
    a = architecture
    tables = 1 if a.tied_embeddings else 2
    layer = _layer_parameters(a, 1) + _expert_parameters(a)
    return a.num_layers * layer + tables * a.vocab_size * a.hidden_size + a.hidden_size


def active_parameters(architecture: ModelArchitecture) -> int:
    """`num_parameters` without the experts that a token does not go to."""
    a, experts = architecture, architecture.experts
    if experts is None:
        return num_parameters(a)
    idle = a.num_layers * _expert_parameters(a) * (experts.num_experts - experts.router_topk) // experts.num_experts
    return num_parameters(a) - idle


def stage_parameters(architecture: ModelArchitecture, layout: LayoutSizes, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, vocabulary padding included."""
    a, last = architecture, stage == layout.pipeline - 1
    table = vocabulary_rows(a, layout) * a.hidden_size
    count = a.num_layers // layout.pipeline * _layer_parameters(a, layout.tensor) + _stage_experts(a, layout)
    if stage == 0:
        count += table
    if last:
        # A tied head on another stage than the embedding is a copy of it.
        count += a.hidden_size + (table if not a.tied_embeddings or layout.pipeline > 1 else 0)
    return count


def vocabulary_rows(architecture: ModelArchitecture, layout: LayoutSizes) -> int:
    """Rows of the embedding (and of the head) on one rank."""
    return architecture.padded_vocab_size(layout.vocab_multiple, layout.tensor) // layout.tensor


def _layer_parameters(a: ModelArchitecture, tensor: int) -> int:
    query, key = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    router = 0
    if a.experts is not None:
        router = a.hidden_size * (a.experts.num_experts + (a.experts.shared_ffn_hidden_size is not None))
    biases = query + 2 * key if a.add_qkv_bias else 0
    norms = 2 * a.hidden_size + (2 * a.kv_channels if a.qk_layernorm else 0)
    return (_layer_matrices(a) + biases) // tensor + norms + router


def _layer_matrices(a: ModelArchitecture) -> int:
    """Parameters of a layer's linear layers over all tensor-parallel ranks, but for its experts."""
    query, key = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    dense = a.ffn_hidden_size if a.experts is None else a.experts.shared_ffn_hidden_size or 0
    return a.hidden_size * (query + 2 * key) + query * a.hidden_size + 3 * a.hidden_size * dense


def _expert_parameters(a: ModelArchitecture) -> int:
    """Of all experts of a layer but the shared one."""
    return 3 * a.hidden_size * a.experts.ffn_hidden_size * a.experts.num_experts if a.experts else 0


def _stage_experts(a: ModelArchitecture, layout: LayoutSizes) -> int:
    """Parameters of experts on one rank."""
    return a.num_layers // layout.pipeline * _expert_parameters(a) // layout.expert


def _feed_forward_channels(a: ModelArchitecture) -> int:
    """That one token goes through."""
    if a.experts is None:
        return a.ffn_hidden_size
    return a.experts.router_topk * a.experts.ffn_hidden_size + (a.experts.shared_ffn_hidden_size or 0)


def model_bytes(architecture: ModelArchitecture, layout: LayoutSizes, stage: int, *, trained: bool) -> ModelBytes:
    """One model on one rank.

    Args:
        architecture: shape of the model.
        layout: how it is sharded.
        stage: pipeline stage of the rank.
        trained: a frozen model has weights only.
    """
    count = stage_parameters(architecture, layout, stage)
    if not trained:
        return ModelBytes(weights=count * layout.item_bytes, gradients=0, optimizer=0)
    master = FLOAT32 if layout.item_bytes < FLOAT32 else 0
    experts, copies = _stage_experts(architecture, layout), layout.data * layout.context
    owned = count
    if layout.distributed_optimizer:
        owned = (count - experts) // copies + experts * layout.expert // (copies * layout.tensor)
    return ModelBytes(
        weights=count * layout.item_bytes,
        gradients=count * FLOAT32,
        optimizer=owned * (master + 2 * FLOAT32),
    )


def fp8_copy_bytes(architecture: ModelArchitecture, layout: LayoutSizes, *, training: bool) -> int:
    """FP8 copies of the layers' matrices that one model keeps on one rank from a pass's first micro-batch on.

    Args:
        architecture: shape of the model.
        layout: how it is sharded.
        training: backward passes take a transposed copy as well (on Hopper, whose FP8 products need it).
    """
    if not layout.fp8:
        return 0
    matrices = architecture.num_layers // layout.pipeline * _layer_matrices(architecture) // layout.tensor
    return (matrices + _stage_experts(architecture, layout)) * (2 if training else 1)


def num_trained_models(config: AnyConfig) -> int:
    """Models with an optimizer."""
    return 1 + int(isinstance(config, PrimeConfig) and config.uses_prm)


def num_checkpoints(config: AnyConfig) -> int:
    """Checkpoints that exist at one time at the most; one more than is kept while it is written."""
    section = config.checkpoint
    num_saves = math.ceil(config.run.num_steps / section.every_steps) if section.every_steps else 1
    # A supervised run has no accuracy, and one without evaluations neither.
    rated = isinstance(config, PrimeConfig) and config.evaluation.num_prompts > 0
    return min(num_saves, section.keep_last + (section.keep_best or 0 if rated else 0) + 1)


def checkpoint_bytes(config: AnyConfig, architecture: ModelArchitecture, layout: LayoutSizes) -> int:
    """A checkpoint of all trained models over all ranks: weights, masters and moments."""
    count = 0
    for stage in range(layout.pipeline):
        experts = _stage_experts(architecture, layout)
        dense = stage_parameters(architecture, layout, stage) - experts
        count += dense * layout.tensor + experts * layout.expert
    master = FLOAT32 if layout.item_bytes < FLOAT32 else 0
    return num_trained_models(config) * count * (layout.item_bytes + master + 2 * FLOAT32)


def exported_bytes(config: AnyConfig, architecture: ModelArchitecture, layout: LayoutSizes) -> int:
    """The trained models as Hugging Face folders, of the end of a run and of `export_every_saves`."""
    section = config.checkpoint
    every = section.every_steps * section.export_every_saves
    num_exports = int(section.export_hf) + (config.run.num_steps // every if every else 0)
    return num_exports * num_trained_models(config) * num_parameters(architecture) * layout.item_bytes


def layer_activation_bytes(architecture: ModelArchitecture, layout: LayoutSizes) -> float:
    """What one layer keeps of one of a rank's tokens for its backward pass."""
    a, item = architecture, layout.item_bytes
    query, key = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    # Rotated queries, keys and values repeated for every head, the output; or without repeats: the joint projection,
    # which stays alive through the values, rotated queries and keys, the output.
    attention = item * (4 * query if layout.local_layers and query != key else 3 * query + 3 * key)
    if layout.local_layers:
        # Gathered keys and values of the other context-parallel ranks' tokens.
        attention += item * 2 * query * (layout.context - 1)
    if a.qk_layernorm:
        # A local norm keeps float32 copies of input and product; unconverted input keeps the whole projection.
        copies = (3 if item == FLOAT32 else 2) if layout.local_layers else 0
        attention += copies * FLOAT32 * (query + key) if copies else item * (query + key)
    # Gate and up, silu(gate) and up again unless fused, their product; for every chosen expert a token's way there and
    # back.
    feed_forward = item * (5 if layout.on_cpu else 3) * _feed_forward_channels(a)
    if a.experts is not None:
        feed_forward += item * 4 * a.experts.router_topk * a.hidden_size
    statistics = FLOAT32 * (a.num_attention_heads / layout.tensor + 2 / layout.norm_shards)
    rotary = 4 * FLOAT32 * a.kv_channels if layout.local_layers else 0
    return 2 * _norm_bytes(a, layout) + (attention + feed_forward) / layout.tensor + statistics + rotary


def _norm_bytes(a: ModelArchitecture, layout: LayoutSizes) -> float:
    """Of one token: the norm's input and output; torch's keeps input and product in float32 beside the output."""
    per_channel = layout.item_bytes + 2 * FLOAT32 if layout.local_layers else 2 * layout.item_bytes
    return per_channel * a.hidden_size / layout.norm_shards


def kept_bytes(
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    stage: int,
    num_tokens: int,
    num_micro_batches: int,
) -> int:
    """What a stage keeps for backward at its peak, micro-batches in flight included (1F1B schedule).

    Core-attention (``selective``) recomputation saves nothing here: the attention stores no scores.

    Args:
        architecture: shape of the model.
        layout: how it is sharded, and what it recomputes.
        stage: pipeline stage; stage 0 has the most micro-batches in flight.
        num_tokens: of a micro-batch, the rank's own.
        num_micro_batches: of one optimizer step on this replica.
    """
    a, virtual = architecture, layout.virtual
    later = layout.pipeline - stage - 1
    # Interleaved: Narayanan et al., arXiv 2104.04473, section 2.2, counted in parts of a stage.
    parts = later + 1 if virtual == 1 else 2 * later + (virtual - 1) * layout.pipeline + 1
    in_flight = min(parts, num_micro_batches * virtual)
    if layout.recompute == "full":
        per_layer = layout.item_bytes * a.hidden_size / layout.norm_shards
    else:
        per_layer = layer_activation_bytes(a, layout)
    kept = in_flight * (a.num_layers // (layout.pipeline * virtual)) * per_layer
    if stage == layout.pipeline - 1:
        # The final norm without its output, of which the head keeps the response tokens: nearly all.
        final_output = layout.item_bytes * a.hidden_size
        kept += _norm_bytes(a, layout) - final_output / layout.norm_shards + final_output
    return int(num_tokens * kept)


def backward_bytes(architecture: ModelArchitecture, layout: LayoutSizes, num_tokens: int) -> int:
    """What exists at one time in a layer's backward pass beside what was kept: gradients of activations, of which the
    feed-forward part is widest, and what the layer recomputes."""
    a = architecture
    per_token = layout.item_bytes * (3 * _feed_forward_channels(a) / layout.tensor + 2 * a.hidden_size)
    if layout.recompute == "full":
        per_token += layer_activation_bytes(a, layout)
    return int(num_tokens * per_token)


def forward_bytes(architecture: ModelArchitecture, layout: LayoutSizes, num_tokens: int) -> int:
    """Activations of the one layer that computes, without backward."""
    a = architecture
    per_token = 4 * _feed_forward_channels(a) / layout.tensor + 2 * a.hidden_size
    return int(layout.item_bytes * num_tokens * per_token)


def head_bytes(
    architecture: ModelArchitecture, layout: LayoutSizes, num_tokens: int, workspace_bytes: float, *, backward: bool
) -> int:
    """Peak of the log-prob op on the last stage: float32 logits of one tile with their exponentials and hidden states
    in float32. Backward adds the exponentials that the workspace keeps, the hidden states' gradient, and a gradient
    of the head that only has the right shape (the real one is in Megatron's buffer).
    """
    rows, hidden = vocabulary_rows(architecture, layout), architecture.hidden_size
    logits = FLOAT32 * num_tokens * rows
    tile = int(2 * min(logits, workspace_bytes, LOGIT_TILE_BYTES)) + FLOAT32 * num_tokens * hidden
    if not backward:
        return tile
    kept = int(min(logits, workspace_bytes))
    return tile + kept + layout.item_bytes * rows * hidden + (FLOAT32 + layout.item_bytes) * num_tokens * hidden


def kv_token_bytes(architecture: ModelArchitecture, item_bytes: int, tensor: int) -> float:
    """Keys and values of one token on one of ``tensor`` engine ranks, all layers."""
    a = architecture
    return 2 * a.num_query_groups * a.kv_channels * a.num_layers * item_bytes / min(tensor, a.num_query_groups)
