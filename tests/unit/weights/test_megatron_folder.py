"""Megatron's checkpoints one weight at a time: written in shards, taken up where a file ends, read whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prime.checkpoint.journal import Journal
from megatron_prime.checkpoint.torch_dist import COMMON_FILE, StoredChunk, file_name
from megatron_prime.errors import CheckpointError
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.families import WeightSpec, weight_specs
from megatron_prime.weights.megatron_folder import (
    MegatronFolder,
    MegatronWriter,
    shard_chunks,
    stored_key,
    stored_shape,
)
from megatron_prime.weights.sharding import local_slice

TP_SIZE, PADDED = 2, 104
"""The vocabulary has 101 tokens."""
JOB = {"job": 1}


def shard(spec: WeightSpec, architecture: ModelArchitecture, source: Path, rank: int) -> torch.Tensor:
    weights = load_file(source / "model.safetensors")
    return local_slice(
        spec,
        architecture,
        lambda name, slices: weights[name][slices],
        tp_rank=rank,
        tp_size=TP_SIZE,
        padded_vocab_size=PADDED,
    )


def chunks_of(source: Path, rank: int, specs: Sequence[WeightSpec] | None = None) -> Iterator[StoredChunk]:
    architecture = read_architecture(source)
    for spec in specs or weight_specs(architecture):
        if spec.is_whole and rank > 0:
            continue
        whole = stored_shape(spec, architecture, PADDED)
        for offsets, part in shard_chunks(spec, shard(spec, architecture, source, rank), tp_rank=rank, tp_size=TP_SIZE):
            yield StoredChunk(stored_key(spec), whole, offsets, part.clone())


def write(source: Path, target: Path, specs: Sequence[WeightSpec] | None = None) -> MegatronFolder:
    writer = MegatronWriter(Journal(target, JOB), torch.float32)
    for rank in range(TP_SIZE):
        writer.write_file(rank, chunks_of(source, rank, specs))
    writer.finish()
    return MegatronFolder(target)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied", "llama3-untied", "qwen3-moe"])
def test_what_was_written_in_shards_is_read_whole(model_folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = model_folders[name]
    architecture = read_architecture(source)
    folder = write(source, tmp_path / "out")
    folder.validate(weight_specs(architecture), architecture)
    assert folder.dtypes == {torch.float32}
    weights = load_file(source / "model.safetensors")
    for spec in weight_specs(architecture):
        whole = local_slice(
            spec,
            architecture,
            lambda name, slices: weights[name][slices],
            tp_rank=0,
            tp_size=1,
            padded_vocab_size=PADDED,
        )
        assert torch.equal(folder.fetch(spec), whole), spec.megatron_name


def test_layers_and_experts_are_stacked_under_one_name(model_folders: dict[str, Path]) -> None:
    architecture = read_architecture(model_folders["qwen3-moe"])
    by_key: dict[str, list[WeightSpec]] = {}
    for spec in weight_specs(architecture):
        by_key.setdefault(stored_key(spec), []).append(spec)
    experts = next(specs for key, specs in by_key.items() if key.endswith("experts.linear_fc2.weight"))
    assert len(experts) == architecture.num_layers * 4
    assert stored_shape(experts[0], architecture, PADDED) == (architecture.num_layers, 4, 48, 20)
    norms = next(specs for key, specs in by_key.items() if key.endswith("q_layernorm.weight"))
    assert stored_shape(norms[0], architecture, PADDED) == (architecture.num_layers, 16)


def test_a_file_that_was_begun_is_continued_and_a_torn_end_is_overwritten(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = model_folders["qwen2-untied"]
    expected = write(source, tmp_path / "whole")
    chunks = list(chunks_of(source, 0))
    first = MegatronWriter(Journal(tmp_path / "out", JOB), torch.float32)
    first.write_file(0, chunks[:5])
    with (tmp_path / "out" / file_name(0)).open("ab") as file:
        file.write(b"half a chunk")
    second = MegatronWriter(Journal(tmp_path / "out", JOB), torch.float32)
    assert second.written(0) == {(chunk.key, chunk.offsets) for chunk in chunks[:5]} and second.written(1) == set()
    second.write_file(0, chunks[5:])
    second.write_file(1, chunks_of(source, 1))
    second.finish()
    for rank in range(TP_SIZE):
        written = (tmp_path / "out" / file_name(rank)).read_bytes()
        assert written == (tmp_path / "whole" / file_name(rank)).read_bytes()
    spec = weight_specs(read_architecture(source))[0]
    assert torch.equal(MegatronFolder(tmp_path / "out").fetch(spec), expected.fetch(spec))


def test_a_checkpoint_of_another_model_has_every_difference_named(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write(model_folders["qwen2-untied"], tmp_path / "out")
    other = read_architecture(model_folders["qwen3-untied"])
    with pytest.raises(CheckpointError) as caught:
        folder.validate(weight_specs(other), other)
    lines = str(caught.value).splitlines()
    assert any(line.endswith("self_attention.q_layernorm.weight: missing") for line in lines)
    assert any(line.endswith("self_attention.linear_qkv.bias: not a weight of this model") for line in lines)
    assert any("of another model: decoder.layers.self_attention.linear_qkv.weight has shape" in line for line in lines)


def test_a_weight_that_some_shards_are_missing_of_is_not_written_as_a_whole(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = model_folders["qwen2-untied"]
    writer = MegatronWriter(Journal(tmp_path / "out", JOB), torch.float32)
    writer.write_file(0, chunks_of(source, 0))
    with pytest.raises(CheckpointError, match="do not make a whole"):
        writer.finish()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / file_name(1)).unlink(), r"damaged: __1_0\.distcp is missing or shorter than \d+"),
        (
            lambda folder: (folder / file_name(0)).write_bytes((folder / file_name(0)).read_bytes()[:-1]),
            r"damaged: __0_0\.distcp is missing or shorter",
        ),
        (lambda folder: (folder / COMMON_FILE).write_bytes(b""), r"damaged: common\.pt is missing or truncated"),
    ],
    ids=["file missing", "file truncated", "common values truncated"],
)
def test_damage_is_seen_when_the_folder_is_opened(
    model_folders: dict[str, Path], tmp_path: Path, harm, message: str
) -> None:
    write(model_folders["qwen2-untied"], tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        MegatronFolder(tmp_path / "out")
