"""Attention over rows of any length, beside a slow one over each row's whole sequence in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.rollout.embedded import kv_cache
from megatron_prime.rollout.embedded.kv_cache import Decode, KVCache, Prefill

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def heads(num_rows: int, num_heads: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, num_heads, length, SIZE, generator=torch.Generator().manual_seed(seed))


def slow_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Each query [heads, t, d] over keys and values [kv heads, n, d], of which the last is its own position."""
    result = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        shared = head * keys.shape[0] // query.shape[0]
        for place in range(query.shape[1]):
            stop = keys.shape[1] - query.shape[1] + place + 1
            logits = [SCALE * float(query[head, place].double() @ keys[shared, n].double()) for n in range(stop)]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for n, weight in enumerate(weights):
                result[head, place] += weight / sum(weights) * values[shared, n].double()
    return result


def test_rows_decode_as_their_own_sequences_do_after_moves_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_MIN_GROWTH", 1)
    cache = KVCache(num_rows=3, max_length=40)
    lengths = (5, 2)
    key, value, query = (heads(2, n, 5, seed) for n, seed in ((KV_HEADS, 1), (KV_HEADS, 2), (HEADS, 3)))
    cache.reserve(5)
    # The second prompt goes into two rows.
    first = Prefill(cache, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])).attend(0, query, key, value, scale=SCALE)
    sequences = {}
    for prompt, length in enumerate(lengths):
        expected = slow_attention(query[prompt, :, :length], key[prompt, :, :length], value[prompt, :, :length])
        torch.testing.assert_close(first[prompt, :, :length].double(), expected, rtol=1e-5, atol=1e-5)
        for row in ([0], [1, 2])[prompt]:
            sequences[row] = (key[prompt, :, :length], value[prompt, :, :length])
    for step in range(12):
        new_key, new_value, new_query = (
            heads(3, n, 1, 10 * step + seed) for n, seed in ((KV_HEADS, 4), (KV_HEADS, 5), (HEADS, 6))
        )
        position = torch.tensor([sequences[row][0].shape[1] for row in range(3)])
        longest = int(position.max()) + 1
        cache.reserve(longest)
        found = Decode(cache, position, longest, torch.float32).attend(0, new_query, new_key, new_value, scale=SCALE)
        for row in range(3):
            sequences[row] = tuple(
                torch.cat([old, new[row]], dim=1) for old, new in zip(sequences[row], (new_key, new_value), strict=True)
            )
            expected = slow_attention(new_query[row], *sequences[row])
            torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
        if step == 5:
            # The first row has ended; the last one takes its place, and another answer the last one's.
            cache.move(torch.tensor([2]), torch.tensor([0]))
            sequences[0] = sequences[2]


def test_fewer_rows_than_the_cache_has_may_decode() -> None:
    cache = KVCache(num_rows=4, max_length=8)
    cache.reserve(2)
    key, value, query = heads(1, KV_HEADS, 1, 1), heads(1, KV_HEADS, 1, 2), heads(1, HEADS, 1, 3)
    found = Decode(cache, torch.tensor([0]), 1, torch.float32).attend(3, query, key, value, scale=SCALE)
    # There is one position: whatever the query, its value is what comes out.
    expected = value.repeat_interleave(HEADS // KV_HEADS, dim=1)
    torch.testing.assert_close(found, expected)


def test_growing_at_least_doubles_and_never_exceeds_the_longest_sequence() -> None:
    cache = KVCache(num_rows=1, max_length=1000)
    sizes = []
    for length in (1, 100, 200, 280, 600, 999):
        cache.reserve(length)
        keys, _ = cache.layer(0, heads(1, KV_HEADS, 1, 0), heads(1, KV_HEADS, 1, 0))
        sizes.append(keys.shape[2])
    assert sizes == [129, 129, 328, 328, 728, 1000]


def test_a_variant_of_attention_that_is_not_known_is_refused() -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    query = heads(1, HEADS, 1, 3)
    with pytest.raises(AssertionError):
        kv_cache._attention(module, query, query, query, None, kv=None, scaling=1.0, sliding_window=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="softcap"):
        kv_cache._attention(module, query, query, query, None, kv=None, scaling=1.0, softcap=3.0)  # type: ignore[call-arg]
