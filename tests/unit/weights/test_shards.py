"""Slices of shards put together again are the Hugging Face tensors, and nothing can be missing unnoticed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.sharding import local_slice
from megatron_prime.weights.shards import ShardSlice, check_cover, cut, cut_for_workers, shard_slices


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


@pytest.mark.parametrize(("tp_size", "num_workers"), [(1, 2), (1, 4), (2, 2), (4, 2), (2, 3)])
def test_no_piece_is_the_business_of_two_workers(model_folder: Path, tp_size: int, num_workers: int) -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(model_folder / "model.safetensors").items()}
    slices = all_slices(model_folder, tp_size)
    pieces = [p for part in slices for p in cut_for_workers(part, shapes[part.name][part.dim], num_workers)]
    check_cover(shapes, [(p.name, p.ranges) for p in pieces])
    assert {part.name for part in pieces if part.dim == 1} >= {"model.layers.0.self_attn.o_proj.weight"}
    for piece in pieces:
        (start, stop), size = piece.ranges[piece.dim], shapes[piece.name][piece.dim]
        edges = [number * size // num_workers for number in range(num_workers + 1)]
        assert any(first <= start and stop <= last for first, last in pairwise(edges))
    whole = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    for piece in pieces:
        cut(whole[piece.name], piece.ranges).copy_(piece.values)
    original = load_file(model_folder / "model.safetensors")
    assert all(torch.equal(whole[name], tensor.float()) for name, tensor in original.items())


def test_more_ranks_than_the_vocabulary_needs_hold_only_padding(model_folder: Path) -> None:
    architecture = read_architecture(model_folder)
    spec = next(s for s in weight_specs(architecture) if s.hf_names == ("model.embed_tokens.weight",))
    padding = torch.zeros(architecture.vocab_size, architecture.hidden_size)
    assert shard_slices(spec, architecture, padding, tp_rank=1, tp_size=2) == []


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
