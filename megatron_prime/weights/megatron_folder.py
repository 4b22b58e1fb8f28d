"""Megatron's distributed checkpoints (format ``torch_dist``), read and written one weight at a time, without Megatron.

Such a folder stacks the weights of all layers: ``decoder.layers.mlp.linear_fc2.weight`` is [layers, rows, columns], in
chunks of one layer and one tensor-parallel shard; gate and up projection are chunks of their own. Experts are stacked
in the same way, in a second dimension. Names are those of Transformer Engine's layers. Weights load at any layout,
whatever the chunks.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_prime.checkpoint.journal import Journal, Part
from megatron_prime.checkpoint.torch_dist import (
    COMMON_FILE,
    ChunkRecord,
    CountedFile,
    StoredChunk,
    file_name,
    read_chunks,
    read_description,
    write_description,
)
from megatron_prime.errors import CheckpointError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import Sharding, WeightSpec
from megatron_prime.weights.sharding import local_shape

ChunkPlace = tuple[str, tuple[int, ...]]
"""Name of a stored tensor and offsets in it."""
_NO_WEIGHTS = ("optimizer.",)
_EXTRA_STATE = "_extra_state"


def stored_key(spec: WeightSpec) -> str:
    """Name of the stored tensor that holds a weight."""
    name = spec.transformer_engine_name.replace(f"layers.{spec.layer}.", "layers.", 1)
    return name.replace(f"local_experts.{spec.expert}.", "experts.", 1)


def stored_shape(spec: WeightSpec, architecture: ModelArchitecture, padded_vocab_size: int) -> tuple[int, ...]:
    """Shape of the stored tensor that holds a weight, over all layers and experts."""
    whole = local_shape(spec, architecture, tp_size=1, padded_vocab_size=padded_vocab_size)
    experts = (architecture.experts.num_experts,) if architecture.experts and spec.expert is not None else ()
    return whole if spec.layer is None else (architecture.num_layers, *experts, *whole)


def shard_chunks(
    spec: WeightSpec, shard: Tensor, *, tp_rank: int, tp_size: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Places a tensor-parallel shard in the stored tensor.

    Args:
        spec: the weight.
        shard: of `sharding.local_slice`.
        tp_rank: which shard; a weight that ranks hold whole is stored for rank 0 only.
        tp_size: number of shards.

    Yields:
        (offsets in the stored tensor, view of the shard).
    """
    stack = _place(spec)
    tp_size = 1 if spec.is_whole else tp_size
    parts = shard.chunk(2) if spec.sharding is Sharding.GATE_UP else (shard,)
    dim = 1 if spec.sharding is Sharding.ROW else 0
    for number, part in enumerate(parts):
        offsets = [0] * part.dim()
        offsets[dim] = (number * tp_size + tp_rank) * part.shape[dim]
        yield (*stack, *offsets), part.view(*(1,) * len(stack), *part.shape)


def _place(spec: WeightSpec) -> tuple[int, ...]:
    """Layer and expert, as far as the stored tensor has such dimensions."""
    return tuple(number for number in (spec.layer, spec.expert) if number is not None)


class MegatronWriter:
    """Writes the files of a checkpoint into a folder that is not taken for a checkpoint before `finish`.

    Args:
        journal: of that folder; chunks that it knows are there.
        dtype: of all weights.
    """

    def __init__(self, journal: Journal, dtype: torch.dtype) -> None:
        self._journal = journal
        self._path = journal.folder
        self._dtype = dtype
        self._records: list[ChunkRecord] = []

    def written(self, rank: int) -> set[ChunkPlace]:
        """The chunks that a file begins with."""
        return {(part["key"], tuple(part["offsets"])) for part in self._whole_parts(rank)}

    def write_file(self, rank: int, chunks: Iterable[StoredChunk]) -> None:
        """Writes the rest of one file, taking its chunks one by one; a chunk's memory must be its own."""
        name = file_name(rank)
        parts = self._whole_parts(rank)
        end = parts[-1]["start"] + parts[-1]["length"] if parts else 0
        for part in parts:
            self._note(part)
        with (self._path / name).open("r+b" if parts else "wb") as file:
            file.truncate(end)
            file.seek(end)
            for key, shape, offsets, tensor in chunks:
                start, written = file.tell(), CountedFile(file)
                torch.save(tensor, written)  # type: ignore[arg-type]
                part = {
                    "file": name,
                    "start": start,
                    "length": written.num_bytes,
                    "crc32": written.crc32,
                    "key": key,
                    "shape": list(shape),
                    "offsets": list(offsets),
                    "sizes": list(tensor.shape),
                }
                file.flush()
                self._journal.note(part)
                self._note(part)
            os.fsync(file.fileno())

    def _whole_parts(self, rank: int) -> list[Part]:
        """The parts of a file up to the first gap."""
        parts: list[Part] = []
        for part in self._journal.parts_of(file_name(rank)):
            if part["start"] != (parts[-1]["start"] + parts[-1]["length"] if parts else 0):
                break
            parts.append(part)
        return parts

    def _note(self, part: Part) -> None:
        shape, offsets, sizes = (tuple(part[name]) for name in ("shape", "offsets", "sizes"))
        place = part["file"], part["start"], part["length"]
        self._records.append(ChunkRecord(part["key"], shape, offsets, sizes, self._dtype, *place))

    def finish(self) -> None:
        """Writes what makes the files a checkpoint, and ends the journal."""
        write_description(self._path, self._records, common={})
        self._journal.finish()


class MegatronFolder:
    """The weights of a checkpoint: opening reads descriptions, `fetch` one weight.

    Args:
        path: made here, or a model of a run's checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata: Any = read_description(path)
        stored = self._metadata.state_dict_metadata
        self._check_files()
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: tensor
            for key, tensor in stored.items()
            if isinstance(tensor, TensorStorageMetadata) and not key.startswith(_NO_WEIGHTS) and _EXTRA_STATE not in key
        }

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Types that the weights are stored in."""
        return {tensor.properties.dtype for tensor in self._tensors.values()}

    def num_rows(self, spec: WeightSpec) -> int:
        """Stored rows of a weight of no layer, padding included; 0 where there is none."""
        stored = self._tensors.get(stored_key(spec))
        return stored.size[0] if stored else 0

    def validate(self, specs: Sequence[WeightSpec], architecture: ModelArchitecture) -> None:
        """Checks that the checkpoint has exactly the weights of a model, padding of the vocabulary aside.

        Raises:
            CheckpointError: one line per missing, unknown, misshapen or incomplete weight.
        """
        expected = {
            stored_key(spec): stored_shape(spec, architecture, max(self.num_rows(spec), architecture.vocab_size))
            for spec in specs
        }
        problems = [f"{self.path}: {key}: missing" for key in sorted(expected) if key not in self._tensors]
        problems += [
            f"{self.path}: {key}: not a weight of this model" for key in sorted(self._tensors.keys() - expected)
        ]
        for key in sorted(expected.keys() & self._tensors):
            stored = self._tensors[key]
            if tuple(stored.size) != expected[key]:
                text = f"has shape {tuple(stored.size)}, config.json says {expected[key]}"
                problems.append(f"{self.path}: of another model: {key} {text}")
            elif sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.size):
                problems.append(f"{self.path}: damaged: {key} is incomplete")
        if problems:
            raise CheckpointError("\n".join(problems))

    def fetch(self, spec: WeightSpec) -> Tensor:
        """One weight of a validated checkpoint, whole, on the CPU and as stored.

        Raises:
            CheckpointError: its file is damaged.
        """
        key = stored_key(spec)
        stored = self._tensors[key]
        stack = _place(spec)
        shape = tuple(stored.size[len(stack) :])
        target = torch.empty(shape, dtype=stored.properties.dtype)
        whole = target.view(*(1,) * len(stack), *shape)
        wanted = StoredChunk(key, tuple(stored.size), (*stack, *(0,) * len(shape)), whole)
        read_chunks(self.path, self._metadata, [wanted])
        return target

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file() or file.stat().st_size < end:
                raise CheckpointError(f"{self.path}: damaged: {name} is missing or shorter than {end} bytes")
        if not zipfile.is_zipfile(self.path / COMMON_FILE):
            raise CheckpointError(f"{self.path}: damaged: {COMMON_FILE} is missing or truncated")
