"""A key-value cache whose rows are independent, and the attention over it.

Every row keeps its sequence in slots 0, 1, 2, ... without padding, so rows of any length share a batch, and a row
may be replaced at any time. transformers hands queries, keys and values to `attend` through its registry of
attention functions; its own caches and mask builders take no part.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "megatron_prime_kv"
"""Pass this as `attn_implementation`; the model is then called with a `KVAccess` as keyword `kv`."""

_MIN_GROWTH = 128
"""Tokens of room made beyond what is needed at once."""


class KVAccess(Protocol):
    """How one forward pass uses the cache."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """Stores keys and values [n, kv heads, t, d] and returns the attention of `query` [n, heads, t, d]."""
        ...


class KVCache:
    """Keys and values of up to ``num_rows`` sequences, per layer [num_rows, kv heads, capacity, head size].

    Args:
        num_rows: sequences at the same time.
        max_length: longest sequence that will ever be stored, in tokens.
    """

    def __init__(self, num_rows: int, max_length: int) -> None:
        self.num_rows = num_rows
        self.max_length = max_length
        self._capacity = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Makes room for sequences of ``length`` tokens, and at least doubles it: growing copies everything."""
        if length <= self._capacity:
            return
        grown = min(self.max_length, max(length + _MIN_GROWTH, 2 * self._capacity))
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (_lengthened(keys, grown), _lengthened(values, grown))
        self._capacity = grown

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Overwrites the rows ``target`` by the rows ``source`` (int64 [m] each, disjoint)."""
        for keys, values in self._layers.values():
            keys[target] = keys[source]
            values[target] = values[source]

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Storage of a layer, allocated after the pattern of the first keys and values [., heads, ., d] seen."""
        if index not in self._layers:
            # Zeros, not empty: masked slots have weight 0, and 0 * NaN would still poison the sum.
            self._layers[index] = (
                key.new_zeros(self.num_rows, key.shape[1], self._capacity, key.shape[3]),
                value.new_zeros(self.num_rows, value.shape[1], self._capacity, value.shape[3]),
            )
        return self._layers[index]


class Prefill:
    """First tokens of some prompts, right-padded; each prompt is stored in one or more rows.

    Args:
        cache: has capacity for the padded length.
        rows: int64 [m], rows of the cache to fill.
        prompts: int64 [m], which prompt of the forward pass goes to each of them.
    """

    def __init__(self, cache: KVCache, rows: torch.Tensor, prompts: torch.Tensor) -> None:
        self._cache = cache
        self._rows = rows
        self._prompts = prompts

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """Causal attention; padding comes last, so no real token sees it."""
        keys, values = self._cache.layer(layer, key, value)
        length = key.shape[2]
        keys[self._rows, :, :length] = key[self._prompts]
        values[self._rows, :, :length] = value[self._prompts]
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scale)


class Decode:
    """One token for each of the first rows of the cache.

    Args:
        cache: has capacity for ``length``.
        position: int64 [n], slot that the token takes in its row; it sees this slot and all before.
        length: more than the largest position.
        dtype: of the activations.
    """

    def __init__(self, cache: KVCache, position: torch.Tensor, length: int, dtype: torch.dtype) -> None:
        self._cache = cache
        self._position = position
        self._length = length
        self._rows = torch.arange(len(position), device=position.device)
        hidden = torch.arange(length, device=position.device) > position[:, None]
        self._mask = torch.zeros(hidden.shape, dtype=dtype, device=position.device).masked_fill_(hidden, -torch.inf)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """Attention of one query per row over its filled slots."""
        keys, values = self._cache.layer(layer, key, value)
        keys[self._rows, :, self._position] = key[:, :, 0]
        values[self._rows, :, self._position] = value[:, :, 0]
        num_rows, num_kv_heads, _, head_size = key.shape
        # The heads that share keys stand in for query positions: no copy of the cache per query head.
        grouped = query.reshape(num_rows, num_kv_heads, -1, head_size)
        attended = scaled_dot_product_attention(
            grouped,
            keys[:num_rows, :, : self._length],
            values[:num_rows, :, : self._length],
            attn_mask=self._mask[:, None, None, :],
            scale=scale,
        )
        return attended.reshape(num_rows, query.shape[1], 1, -1)


def _lengthened(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = tensor.new_zeros(*tensor.shape[:2], capacity, tensor.shape[3])
    grown[:, :, : tensor.shape[2]] = tensor
    return grown


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kv: KVAccess,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_router_logits: bool | None = None,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls; it has no ``**kwargs`` so that a variant it does not know fails loudly."""
    assert attention_mask is None and sliding_window is None and dropout == 0.0
    attended = kv.attend(int(module.layer_idx), query, key, value, scale=scaling)  # pyright: ignore[reportArgumentType]
    return attended.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, _attention)
