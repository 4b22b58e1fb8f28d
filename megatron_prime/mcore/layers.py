"""Our own layers for Megatron's local layer spec: norm, router, rotary positions, attention.

Import this module only inside `cpu.megatron_platform`: it imports Megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prime.weights.architecture import Llama3RopeScaling, ModelArchitecture


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm with the constructor that Megatron calls, allowed under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(normalized_shape=hidden_size, eps=eps, dtype=config.params_dtype)
        # Megatron sums the gradients of marked weights over the tensor-parallel ranks, each of which
        # has normalised only its own share of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Router(TopKRouter):
    """Megatron's router with float32 logits from torch: its own product calls Transformer Engine, there or not."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits of the experts, float32 [s, b, num_experts]."""
        return torch.nn.functional.linear(input.float(), self.weight.float())


def rotary_inverse_frequencies(architecture: ModelArchitecture) -> torch.Tensor:
    """Inverse frequencies of the rotary embedding, float32 [kv_channels / 2].

    Llama 3 divides low frequencies by ``factor`` and blends in between, as its model card says.
    """
    dim = architecture.kv_channels
    inverse = 1.0 / architecture.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    scaling = architecture.rope_scaling
    return inverse if scaling is None else _llama3_scaled(inverse, scaling)


def _llama3_scaled(inverse: torch.Tensor, scaling: Llama3RopeScaling) -> torch.Tensor:
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * inverse / scaling.factor + blend * inverse
    scaled = torch.where(wavelength > original / scaling.low_freq_factor, inverse / scaling.factor, blended)
    return torch.where(wavelength < original / scaling.high_freq_factor, inverse, scaled)


class PositionRotaryEmbedding(torch.nn.Module):
    """Rotary angles looked up by position id, for packed and padded micro-batches alike.

    Megatron's own slices the packed tokens per sequence in every layer; here the angles of a
    micro-batch are gathered once.
    """

    def __init__(self, inverse_frequencies: torch.Tensor) -> None:
        super().__init__()
        # Not a buffer: a bfloat16 model would round it, and far positions would turn by wrong angles.
        self.inverse_frequencies = inverse_frequencies
        self._angles = torch.empty(0)

    def set_positions(self, position_ids: torch.Tensor, packed: bool) -> None:
        """Computes the angles of a micro-batch.

        Args:
            position_ids: int64 [b, s]; rows of a padded batch are all 0 .. s-1.
            packed: angles become [s, 1, dim] (thd) instead of [s, 1, 1, dim].
        """
        self.inverse_frequencies = self.inverse_frequencies.to(position_ids.device)
        angles = torch.outer(position_ids[0].float(), self.inverse_frequencies)
        # Hugging Face and Megatron rotate channel i with channel i + dim/2, so each angle occurs in both halves.
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        self._angles = angles if packed else angles[:, None]

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Returns the number of angles, which Megatron asks for before `forward`."""
        return self._angles.shape[0]

    def forward(self, max_seq_len: int, **kwargs: Any) -> torch.Tensor:
        """Angles of the current micro-batch."""
        return self._angles


@dataclass
class ContextQueries:
    """The queries of one context-parallel rank among packed sequences."""

    slots: torch.Tensor
    """int64 [T / size], token -> place in a padded [num_sequences * max_length]."""
    max_length: int
    allowed: torch.Tensor
    """bool [num_sequences, 1, max_length, longest sequence], keys that each query may see."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Packed sequences as this module's attention wants them.

    The cumulative lengths that Megatron's rotary code would loop over stay unset.
    """

    num_sequences: int = 0
    max_length: int = 0
    slots: torch.Tensor | None = None
    """int64 [T], token -> place in a padded [num_sequences * max_length]; None: all lengths are equal."""
    queries: ContextQueries | None = None
    """Set under context parallelism; `slots` then covers all ranks' tokens, rank after rank."""


class _Scatter(torch.autograd.Function):
    """Copies rows to slots of a larger zero tensor; backward picks the slots' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(num_slots, *rows.shape[1:]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Pick(torch.autograd.Function):
    """Copies slots to rows. Slots are distinct, so backward is a copy and not an accumulation."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = padded.shape[0]
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_slots, *grad.shape[1:]).index_copy_(0, slots, grad), None


def _to_rows(tokens: torch.Tensor, num_sequences: int, max_length: int, slots: torch.Tensor | None) -> torch.Tensor:
    """[T, heads, dim] to [sequences, heads, max_length, dim]."""
    if slots is not None:
        tokens = _Scatter.apply(tokens, slots, num_sequences * max_length)  # type: ignore[assignment]
    return tokens.unflatten(0, (num_sequences, max_length)).transpose(1, 2)


class SdpaAttention(MegatronModule):
    """Causal core attention over torch's scaled_dot_product_attention, packed or padded.

    Packed sequences are spread to right-padded rows. Under a causal mask no real token sees the padding behind it, so
    one call without an explicit mask serves all sequences of a micro-batch. Context-parallel ranks gather each other's
    keys and values and mask the keys that their own queries must not see.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.context_group = groups.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """Attention of every token to itself and the tokens before it in its sequence.

        Args:
            query: [T, heads, dim] packed, or [s, b, heads, dim]; key and value with fewer heads.
            attention_mask: bool, true where a query may see a key; only for padded context-parallel micro-batches.

        Returns:
            [T, heads * dim] or [s, b, heads * dim].
        """
        if self.context_group is not None:
            key, value = (gather_from_sequence_parallel_region(x, group=self.context_group) for x in (key, value))
        if packed_seq_params is None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            output = self._attend(query, key, value, attention_mask)
            return output.permute(2, 0, 1, 3).flatten(2)
        packed, queries = packed_seq_params, packed_seq_params.queries
        key, value = (_to_rows(x, packed.num_sequences, packed.max_length, packed.slots) for x in (key, value))
        slots, longest = (packed.slots, packed.max_length) if queries is None else (queries.slots, queries.max_length)
        query = _to_rows(query, packed.num_sequences, longest, slots)
        output = self._attend(query, key, value, None if queries is None else queries.allowed)
        flat = output.transpose(1, 2).flatten(0, 1).flatten(1)
        return flat if slots is None else _Pick.apply(flat, slots)  # type: ignore[return-value]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None
    ) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            # Torch's CPU flash kernel takes no grouped heads and would fall back to a slow one.
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=self.softmax_scale
        )
