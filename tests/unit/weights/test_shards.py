"""Slices of shards put together again are the Hugging Face tensors, and nothing can be missing unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.layouts import local_slice
from megatron_prime.weights.shards import (
    NUM_DIGEST_BYTES,
    ShardSlice,
    _nh_keys,
    block_sums,
    check_cover,
    cut,
    digest,
    find_non_finite,
    shard_slices,
)


def all_slices(folder: Path, tp_size: int) -> list[ShardSlice]:
    """What all tensor-parallel ranks together hold."""
    architecture, opened = read_architecture(folder), HfFolder(folder)
    padded = architecture.padded_vocab_size(32, tp_size)
    return [
        part
        for spec in weight_specs(architecture)
        for rank in range(tp_size)
        for part in shard_slices(
            spec,
            architecture,
            local_slice(spec, architecture, opened.fetch, tp_rank=rank, tp_size=tp_size, padded_vocab_size=padded),
            tp_rank=rank,
            tp_size=tp_size,
        )
    ]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_slices_of_all_ranks_are_the_model_bit_for_bit(model_folder: Path, tp_size: int) -> None:
    original = load_file(model_folder / "model.safetensors")
    slices = all_slices(model_folder, tp_size)
    rebuilt = {name: torch.full_like(tensor, float("nan")) for name, tensor in original.items()}
    for part in slices:
        cut(rebuilt[part.name], part.ranges).copy_(part.values)
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in original.items())
    check_cover({name: tuple(t.shape) for name, t in original.items()}, [(p.name, p.ranges) for p in slices])


def test_more_ranks_than_the_vocabulary_needs_hold_only_padding(model_folder: Path) -> None:
    architecture = read_architecture(model_folder)
    spec = next(s for s in weight_specs(architecture) if s.hf_names == ("model.embed_tokens.weight",))
    padding = torch.zeros(architecture.vocab_size, architecture.hidden_size)
    assert shard_slices(spec, architecture, padding, tp_rank=1, tp_size=2) == []


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


def test_a_cover_with_holes_doubles_or_strangers_is_refused() -> None:
    shapes = {"a": (4, 2), "b": (3,)}
    whole = [("a", ((0, 4), (0, 2))), ("b", ((0, 3),))]
    check_cover(shapes, whole)
    for wrong, message in (
        (whole[:1], "b: 0 of 3 elements"),
        ([*whole, whole[0]], "a: the slice .* is twice there"),
        ([*whole, ("c", ((0, 1),))], "c: the model has no such tensor"),
        ([whole[0], ("b", ((0, 2),))], "b: 2 of 3 elements"),
        ([whole[0], ("b", ((1, 4),))], "outside of"),
    ):
        with pytest.raises(WeightsError, match=message):
            check_cover(shapes, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype, value: float) -> None:
    good = ShardSlice("good", ((0, 100),), torch.randn(100).to(dtype))
    bad = ShardSlice("bad", ((0, 100),), torch.randn(100).to(dtype))
    bad.values[57] = value
    empty = ShardSlice("empty", ((0, 0),), torch.zeros(0, dtype=dtype))
    assert find_non_finite([good, bad, empty]) == ["bad"]


def test_a_folder_gives_its_weights_in_both_ways(model_folder: Path) -> None:
    architecture = read_architecture(model_folder)
    export = FolderExport(HfFolder(model_folder), architecture, torch.bfloat16)
    original = load_file(model_folder / "model.safetensors")
    streamed, sliced = dict(export), {part.name: part for part in export.slices()}
    assert [name for name, _, _ in export.tensors()] == list(streamed)
    for name, shape, dtype in export.tensors():
        assert dtype is torch.bfloat16 and shape == original[name].shape
        assert torch.equal(streamed[name], original[name].to(dtype))
        assert torch.equal(sliced[name].values, streamed[name])


def test_block_sums_are_nh_of_words() -> None:
    values = torch.randn(3, 9001, generator=torch.Generator().manual_seed(1)).bfloat16()
    data = values.view(-1).view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(data[start : start + 8].ljust(8, b"\0"), "little") for start in range(0, len(data), 8)]
    words += [0] * (-len(words) % 8192)
    keys = _nh_keys(values.device).T.tolist()
    assert len({key for pair in keys for key in pair}) > 16380
    expected = [
        sum(
            (word + low) % 2**32 * (((word >> 32) + high) % 2**32)
            for word, (low, high) in zip(words[start : start + 8192], keys, strict=True)
        )
        for start in range(0, len(words), 8192)
    ]
    assert [int(found) % 2**64 for found in block_sums(values)] == [found % 2**64 for found in expected]


def test_block_sums_notice_what_sums_overlook() -> None:
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    wrong = [values.T, values.flip(0), -values, values.roll(8192)]
    two_signs = values.clone()
    two_signs.view(-1)[[1, 3]] *= -1
    swapped = values.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    for other in [*wrong, two_signs, swapped]:
        assert not torch.equal(block_sums(other), block_sums(values))
    assert torch.equal(block_sums(values.T.contiguous().T), block_sums(values))
    assert block_sums(torch.empty(0, 4)).tolist() == []
