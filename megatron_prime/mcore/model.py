"""GPTModel of every supported family, built from an architecture, ending in log-probs.

Import this module only inside `cpu.megatron_platform`: it imports Megatron.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prime.config.schema import ModelSection, ParallelSection
from megatron_prime.kernels import ChunkLoss, HeadOptions, fused_linear_logprob, fused_linear_logprob_loss
from megatron_prime.mcore.context import ContextPart
from megatron_prime.mcore.dtypes import DTYPES
from megatron_prime.mcore.layers import (
    ContextQueries,
    PackedSequences,
    PositionRotaryEmbedding,
    RMSNorm,
    Router,
    SdpaAttention,
    rotary_inverse_frequencies,
)
from megatron_prime.mcore.packing import MicroBatch
from megatron_prime.weights.architecture import ModelArchitecture

logger = logging.getLogger(__name__)

_LENGTH_STEP = 1024
"""The longest sequence of a micro-batch is rounded up to a multiple of this for Transformer Engine."""


def transformer_config(
    architecture: ModelArchitecture, model: ModelSection, parallel: ParallelSection, *, transformer_engine: bool
) -> TransformerConfig:
    """Megatron's configuration of one model, with Transformer Engine's layers or the local ones."""
    dtype = DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        qk_layernorm=architecture.qk_layernorm,
        init_method_std=architecture.hf_config.get("initializer_range", 0.02),
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        **_experts(architecture, parallel),
        # Packed micro-batches differ in length, so pipeline stages tell each other the shape.
        variable_seq_lengths=True,
        # Interleaved stages send in both directions at once; in one batched call two ranks could mistake one message
        # for another.
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        moe_token_dispatcher_type="alltoall",
        # Losses arrive normalised over the whole mini-batch: Megatron must neither divide by the
        # number of micro-batches nor average over data-parallel ranks.
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        # Compiled, SwiGLU keeps its input and its output for backward and nothing between; a CPU compiles for minutes.
        bias_activation_fusion=torch.cuda.is_available(),
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=transformer_engine,
        attention_softmax_in_fp32=True,
        fp8=model.fp8,
        # Scales come from the current values. Delayed scaling needs a history that scoring starts without, and that
        # ranks exchange in every micro-batch, while data-parallel ranks may have different numbers of them.
        fp8_recipe="tensorwise",
        **_recompute(model),
    )


def _experts(architecture: ModelArchitecture, parallel: ParallelSection) -> dict[str, Any]:
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.router_topk,
        # Softmax over the top-k logits equals softmax over all logits renormalised over the top k.
        "moe_router_pre_softmax": not experts.normalize_weights,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_ffn_hidden_size is not None,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def _recompute(model: ModelSection) -> dict[str, Any]:
    if model.recompute_granularity == "none":
        return {}
    if model.recompute_granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def block_spec(
    architecture: ModelArchitecture,
    config: TransformerConfig,
    transformer_engine: bool,
    virtual_stage: int | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers, or Megatron's local ones with our norm and attention in them."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, qk_layernorm=architecture.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        config.num_moe_experts, qk_layernorm=architecture.qk_layernorm, normalization="RMSNorm"
    )
    layer: Any = spec.submodules
    if architecture.experts is not None:
        layer.mlp.submodules.router = Router
        # Checkpoints have Transformer Engine's names, and in front of experts it fuses no norm.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention: Any = layer.self_attention.submodules
    attention.core_attention = SdpaAttention
    if architecture.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=virtual_stage), layer_norm=norm
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLoss:
    """A loss that the head evaluates itself, chunk by chunk of response tokens."""

    evaluate: ChunkLoss
    sequence_lengths: Sequence[int] | None
    """Response tokens of each sequence, where the loss needs whole sequences."""
    with_entropy: bool


class LogprobModel(GPTModel):
    """A GPTModel whose last stage returns log-probs of the response tokens, or a loss of them, instead of logits.

    Called with ``labels`` (the response tokens, [n]) and ``loss_mask`` (true on positions that predict one), the
    last stage gives float [n], the log-prob of each response token; with ``head_loss`` a scalar. Only
    these n positions reach the head.
    """

    head_options: HeadOptions
    temperature: float = 1.0
    true_vocab_size: int
    head_loss: HeadLoss | None = None
    context: ContextPart | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *args: Any,
        head_loss: HeadLoss | None = None,
        context: ContextPart | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs GPTModel.forward after passing positions to the rotary embedding, and loss and tokens to the head."""
        self.head_loss, self.context = head_loss, context
        if isinstance(self.rotary_pos_emb, PositionRotaryEmbedding):
            self.rotary_pos_emb.set_positions(position_ids, kwargs.get("packed_seq_params") is not None)
        return super().forward(input_ids, position_ids, *args, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        targets = kwargs["labels"]
        selected, shards = self._response_states(hidden_states, kwargs["loss_mask"])
        weight = self._head_weight()
        arguments: dict[str, Any] = {
            "vocab_size": self.true_vocab_size,
            "temperature": self.temperature,
            "tp_group": self.pg_collection.tp,
            "sequence_shards": shards,
            "options": self.head_options,
        }
        loss = self.head_loss
        if loss is None:
            return fused_linear_logprob(selected, weight, targets, **arguments).logprobs
        return fused_linear_logprob_loss(
            selected,
            weight,
            targets,
            loss.evaluate,
            sequence_lengths=loss.sequence_lengths,
            entropy="metric" if loss.with_entropy else "none",
            accumulate_main_grad=hasattr(weight, "main_grad"),
            **arguments,
        ).loss

    def _head_weight(self) -> Any:
        # The fused op uses the weight without calling the layer, so the layer's pre-forward hooks must be run by hand:
        # with overlap_param_gather they wait for the all-gather of its parameters.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _response_states(
        self, hidden_states: torch.Tensor, predicts: torch.Tensor
    ) -> tuple[torch.Tensor, list[int] | None]:
        """Hidden states [n, d] that predict response tokens; where each rank has its own, also how many each has."""
        context = self.context
        if not self.config.sequence_parallel:
            selected = hidden_states.transpose(0, 1)[predicts]
            return (selected if context is None else self._to_owners(selected, context)), None
        if predicts.shape[0] > 1 or context is not None:
            # Concatenating the ranks' selected rows would interleave sequences. The head reduces the gradient itself
            # (tensor_parallel_output_grad=False), so backward must only split it.
            whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
            selected = whole.transpose(0, 1)[predicts]
            return (selected if context is None else self._to_owners(selected, context)), None
        # One packed row: each rank's contiguous share of positions is a contiguous run of response tokens.
        shares = predicts.view(-1, hidden_states.shape[0])
        return hidden_states[shares[self.pg_collection.tp.rank()], 0], shares.sum(dim=1).tolist()

    def _to_owners(self, selected: torch.Tensor, context: ContextPart) -> torch.Tensor:
        """Exchanges hidden states of response tokens, so that each context-parallel rank has its answers whole."""
        received = all_to_all(
            self.pg_collection.cp,
            selected[context.send_order.to(selected.device)],
            list(context.receive_counts),
            list(context.send_counts),
        )
        return received[context.receive_order.to(selected.device)]


def build_chunks(
    architecture: ModelArchitecture,
    model: ModelSection,
    parallel: ParallelSection,
    *,
    transformer_engine: bool,
    head_options: HeadOptions,
    device: torch.device,
) -> list[LogprobModel]:
    """This rank's parts of the model, with Megatron's random initialisation: one, or one per virtual pipeline stage.

    Args:
        architecture: shape, from the Hugging Face config.
        model: types and layer implementation.
        parallel: the layout.
        transformer_engine: whose layers; else the local ones.
        head_options: of the log-prob op.
        device: where the parameters live.
    """
    config = transformer_config(architecture, model, parallel, transformer_engine=transformer_engine)
    num_chunks = parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if num_chunks is None else list(range(num_chunks))
    return [
        _build_chunk(architecture, model, parallel, config, transformer_engine, stage, head_options, device)
        for stage in stages
    ]


def _build_chunk(
    architecture: ModelArchitecture,
    model: ModelSection,
    parallel: ParallelSection,
    config: TransformerConfig,
    transformer_engine: bool,
    virtual_stage: int | None,
    head_options: HeadOptions,
    device: torch.device,
) -> LogprobModel:
    where: dict[str, Any] = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    result = LogprobModel(
        config=config,
        transformer_layer_spec=block_spec(architecture, config, transformer_engine, virtual_stage),  # type: ignore[arg-type]
        vocab_size=architecture.padded_vocab_size(
            model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
        ),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,  # type: ignore[arg-type]
        vp_stage=virtual_stage,
    )
    inverse = rotary_inverse_frequencies(architecture)
    if transformer_engine:
        result.rotary_pos_emb.inv_freq = inverse.to(device)
    else:
        result.rotary_pos_emb = PositionRotaryEmbedding(inverse)  # type: ignore[assignment]
    for name, parameter in result.named_parameters():
        if ".experts." in name:
            # Without expert parallelism Megatron would sum an expert's gradient over data-parallel ranks only; but
            # tensor-parallel ranks hold copies of the expert too, and under sequence parallelism see other tokens.
            parameter.allreduce = False  # type: ignore[attr-defined]
    result.true_vocab_size = architecture.vocab_size
    result.head_options = head_options
    return result.to(device)


def packed_parameters(
    micro_batch: MicroBatch, *, transformer_engine: bool, device: torch.device
) -> PackedSeqParams | None:
    """Describes the packed sequences for the attention in use; None for a padded micro-batch.

    Args:
        micro_batch: on the CPU.
        transformer_engine: whose attention is in use; else `SdpaAttention`.
        device: where the attention runs.
    """
    if not micro_batch.packed:
        return None
    lengths = torch.tensor(micro_batch.lengths)
    longest = int(lengths.max())
    if transformer_engine:
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        # An upper bound is enough, and few distinct values are better: Megatron caches the rotary embedding of 32
        # bounds per model, and cuDNN builds a plan for each.
        bound = longest + -longest % _LENGTH_STEP
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=bound,
            max_seqlen_kv=bound,
        )
    context, slots = micro_batch.context, None
    if context is not None or bool((lengths != longest).any()):
        slots = (torch.arange(longest) < lengths[:, None]).flatten().nonzero().squeeze(1)
    return PackedSequences(
        qkv_format="thd",
        num_sequences=len(lengths),
        max_length=longest,
        slots=None if slots is None else (slots if context is None else slots[context.gathered]).to(device),
        queries=None if slots is None or context is None else _context_queries(slots, longest, context, device),
    )


def _context_queries(slots: torch.Tensor, longest: int, context: ContextPart, device: torch.device) -> ContextQueries:
    mine = slots[context.places]
    sequences, positions = mine // longest, mine % longest
    num_sequences = int(slots[-1]) // longest + 1
    counts = torch.bincount(sequences, minlength=num_sequences)
    width = int(counts.max())
    starts = counts.cumsum(0) - counts
    rows = sequences * width + torch.arange(len(mine)) - starts[sequences]
    # Padding queries see the first key: a softmax over no key at all would be NaN, and NaN spreads in backward.
    last_key = torch.zeros(num_sequences * width, dtype=torch.int64).index_copy_(0, rows, positions)
    allowed = torch.arange(longest) <= last_key.view(num_sequences, 1, width, 1)
    return ContextQueries(slots=rows.to(device), max_length=width, allowed=allowed.to(device))


def padded_attention_mask(
    micro_batch: MicroBatch, *, transformer_engine: bool, device: torch.device
) -> torch.Tensor | None:
    """Masks keys of a padded context-parallel micro-batch, bool [1, 1, s / size, s]; None for other micro-batches."""
    context = micro_batch.context
    if micro_batch.packed or context is None or transformer_engine:
        return None
    return (context.gathered <= context.places[:, None])[None, None].to(device)
