"""A folder's weights on their way into shared memory: values, checksums and progress as an engine reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.trainer.weight_writer import WeightWriter
from megatron_prime.rollout.vllm.wire.shared_memory import SharedWeights
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.digests import digest
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.shards import ShardSlice, cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def export(folder: Path) -> FolderExport:
    return FolderExport(HfFolder(folder), read_architecture(folder), torch.float32)


class Changed(FolderExport):
    """A folder's weights with one of them replaced by NaN."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().__iter__():
            yield name, torch.full_like(tensor, torch.nan) if name == "model.norm.weight" else tensor


class OfTwoHosts(FolderExport):
    """A folder's weights as of a copy whose other rank is on another host."""

    def gather(self, value: Any) -> list[Any]:
        return [value, replace(value, host="elsewhere", process_id=1, slices=[], path=None)]


def writer_of(weights: FolderExport, **section: Any) -> WeightWriter:
    return WeightWriter(weights, VllmSection(**section), is_leader=True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_engine_finds_every_tensor_and_the_checksum_of_every_slice(folder: Path, num_workers: int) -> None:
    weights = export(folder)
    writer = writer_of(weights, tensor_parallel_size=num_workers)
    assert writer.begin(weights) == [] and writer.memory is not None
    assert writer.memory.progress.tolist() == [0]
    writer.write(weights)
    read = SharedWeights(writer.update.plan, writer.path, writable=False)
    read.wait(len(writer.plan.entries) + 1, 1.0)
    expected = dict(weights)
    assert list(read.tensors) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.tensors.items())
    assert len(writer.plan.slices) == num_workers * len(expected)
    for sums, (name, ranges) in zip(read.digests, writer.plan.slices, strict=True):
        assert sums.numpy().tobytes() == digest(cut(expected[name], ranges)), (name, ranges)
    assert writer.checksum() == digest(read.digests).hex()
    writer.close()


def test_values_that_are_not_finite_are_named_before_anything_is_written(folder: Path) -> None:
    bad = Changed(HfFolder(folder), read_architecture(folder), torch.float32)
    for verify_refit in (True, False):
        writer = writer_of(export(folder), verify_refit=verify_refit)
        assert writer.begin(bad) == ["model.norm.weight"]
        assert writer.memory is not None and all(tensor.eq(0).all() for tensor in writer.memory.tensors.values())
        writer.close()


def test_the_next_refit_takes_back_what_was_said_of_the_last(folder: Path) -> None:
    weights = export(folder)
    writer = writer_of(weights)
    writer.begin(weights)
    writer.write(weights)
    assert writer.memory is not None
    before, first = writer.checksum(), writer.memory.progress.clone()
    writer.begin(weights)
    assert first.item() == len(writer.plan.entries) + 1 and writer.memory.progress.item() == 0
    writer.write(weights)
    assert writer.checksum() == before
    writer.close()


def test_without_verification_no_checksums_are_sent(folder: Path) -> None:
    weights = export(folder)
    writer = writer_of(weights, verify_refit=False)
    writer.begin(weights)
    writer.write(weights)
    assert not writer.update.compare_digests and writer.memory is not None
    assert writer.memory.digests.eq(0).all()
    writer.close()


def test_a_copy_on_several_hosts_is_gathered_and_written_by_its_leader(folder: Path) -> None:
    weights = OfTwoHosts(HfFolder(folder), read_architecture(folder), torch.float32)
    writer = writer_of(weights)
    assert writer.gathers and writer.plan.num_writers == 1
    assert writer.begin(weights) == []
    writer.write(weights)
    assert writer.memory is not None
    expected = dict(weights)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in writer.memory.tensors.items())
    whole = [ShardSlice(name, tuple((0, size) for size in t.shape), t) for name, t in expected.items()]
    assert writer.plan.slices == tuple((part.name, part.ranges) for part in whole)
    assert writer.memory.digests.numpy().tobytes() == b"".join(digest(part.values) for part in whole)
    writer.close()
