"""Checksums are those of the values, and nothing that is not finite is overlooked."""

from __future__ import annotations

import pytest
import torch
import xxhash

from megatron_prime.weights.digests import NUM_DIGEST_BYTES, block_values, digest, digest_on, examine, find_non_finite
from megatron_prime.weights.shards import ShardSlice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_digest_is_of_the_values_whatever_their_strides(dtype: torch.dtype) -> None:
    values = torch.arange(60).view(6, 10).to(dtype)
    assert digest(values[:, 2:7]) == digest(values[:, 2:7].contiguous()) == digest(values.T.contiguous().T[:, 2:7])
    seen = {digest(values)}
    for row, column in ((0, 0), (5, 9), (3, 4)):
        changed = values.clone()
        changed[row, column] += 1
        seen.add(digest(changed))
    swapped = values[[1, 0, 2, 3, 4, 5]]
    assert len(seen | {digest(swapped), digest(values.T)}) == 6
    assert len(digest(values[:0])) == NUM_DIGEST_BYTES


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype, value: float) -> None:
    good = ShardSlice("good", ((0, 100),), torch.randn(100).to(dtype))
    bad = ShardSlice("bad", ((0, 100),), torch.randn(100).to(dtype))
    bad.values[57] = value
    empty = ShardSlice("empty", ((0, 0),), torch.zeros(0, dtype=dtype))
    assert find_non_finite([good, bad, empty]) == ["bad"]
    assert examine([good, bad, empty], 2)[1] == ["bad"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([[largest, -largest], [0.0, -0.0], [torch.finfo(dtype).tiny, -largest]], dtype=dtype)
    slices = [ShardSlice(str(n), ((0, 3), (0, 2)), part) for n, part in enumerate((values, -values.abs(), values.T))]
    assert find_non_finite(slices) == examine(slices, 1)[1] == []


@pytest.mark.parametrize("num_threads", [1, 3])
def test_examining_finds_every_digest_and_every_name_in_order(num_threads: int) -> None:
    """Tensors of several pieces too, with what is wrong in any of them."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(700, 1100, generator=generator)
    tensors = [torch.randn(5, generator=generator), whole, whole[:, 1:], whole.T, whole[:3].clone(), whole.clone()]
    tensors[4][2, 1] = float("nan")
    tensors[5][699, 1099] = float("inf")
    slices = [ShardSlice(f"{number}", (), tensor) for number, tensor in enumerate(tensors)]
    sums, found = examine(iter(slices), num_threads)
    assert found == find_non_finite(slices) == ["4", "5"]
    assert sums == b"".join(xxhash.xxh3_128_digest(tensor.contiguous().numpy().tobytes()) for tensor in tensors)
    assert sums == b"".join(digest(tensor) for tensor in tensors)


def test_the_checksum_of_an_accelerator_notices_what_sums_overlook() -> None:
    """Its arithmetic, on the CPU: block values (`test_checksum.py` has their definition) and their digest."""

    def found(tensor: torch.Tensor) -> bytes:
        return digest(torch.cat(list(block_values(tensor))))

    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    two_signs = values.clone()
    two_signs.view(-1)[[1, 3]] *= -1
    swapped = values.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    for other in [values.T, values.flip(0), -values, values.roll(2**15), two_signs, swapped]:
        assert found(other) != found(values)
    assert found(values.T.contiguous().T) == found(values)
    assert len(found(torch.empty(0, 4))) == NUM_DIGEST_BYTES


def test_a_cpu_computes_the_checksum_that_it_reads_fastest() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(3))
    assert digest_on(torch.device("cpu"), values) == digest(values)
