"""Files of Megatron's distributed checkpoints (format ``torch_dist``): chunks of tensors in, chunks of tensors out.

A folder holds named tensors in rectangular chunks, each chunk a `torch.save` of its own somewhere in a data file, and a
description (``.metadata``) of where each lies. Any rectangle of a tensor can be read, whatever the chunks.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prime.checkpoint.manifest import FileRecord, write_file
from megatron_prime.errors import CheckpointError

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}
CONFIG_FILE, METADATA_FILE, COMMON_FILE = "metadata.json", ".metadata", "common.pt"


class StoredChunk(NamedTuple):
    """A rectangle of a stored tensor."""

    key: str
    shape: tuple[int, ...]
    """Of the whole stored tensor."""
    offsets: tuple[int, ...]
    """Where the rectangle begins in it."""
    tensor: Tensor
    """What lies there; where to put it, when reading."""


class ChunkRecord(NamedTuple):
    """Where a written chunk lies."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A data file that is safe on disk."""

    name: str
    record: FileRecord
    chunks: tuple[ChunkRecord, ...]


class CountedFile(io.RawIOBase):
    """A file that knows the size and CRC-32 of what went through it, and the error that ended it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        view = memoryview(data)
        self.num_bytes, self.crc32 = self.num_bytes + view.nbytes, zlib.crc32(view, self.crc32)
        return view.nbytes

    def writable(self) -> bool:
        return True


def file_name(rank: int) -> str:
    """The data file of a rank."""
    return f"__{rank}_0.distcp"


def write_chunks(path: Path, chunks: Iterable[StoredChunk]) -> WrittenFile:
    """Writes a data file, taking its chunks one by one.

    Args:
        path: new file.
        chunks: each tensor on the CPU, with memory of its own (all memory that a view is of would be written).
    """
    records: list[ChunkRecord] = []
    with path.open("wb") as file:
        counted = CountedFile(file)
        for key, shape, offsets, tensor in chunks:
            start = counted.num_bytes
            try:
                torch.save(tensor, cast(IO[bytes], counted))
            except RuntimeError as error:
                # torch reports that it could not finish its archive, not why.
                raise counted.error or error from error
            length = counted.num_bytes - start
            records.append(
                ChunkRecord(key, shape, offsets, tuple(tensor.shape), tensor.dtype, path.name, start, length)
            )
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, FileRecord(counted.num_bytes, counted.crc32), tuple(records))


def write_description(folder: Path, chunks: Iterable[ChunkRecord], common: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Writes what makes data files a checkpoint.

    Args:
        folder: with the data files.
        chunks: all that lie in them.
        common: small values that are the same on every rank.

    Returns:
        The files written.

    Raises:
        CheckpointError: the chunks leave holes in a tensor, or overlap.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    for place in chunks:
        if place.key not in tensors:
            tensors[place.key] = TensorStorageMetadata(TensorProperties(place.dtype), torch.Size(place.shape), [])
        tensors[place.key].chunks.append(ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.sizes)))
        index = MetadataIndex(place.key, torch.Size(place.offsets))
        where[index] = _StorageInfo(place.file, place.start, place.length)
    for key, tensor in tensors.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CheckpointError(f"{folder}: the parts of {key} do not make a whole of {tuple(tensor.size)}")
    metadata = Metadata(cast(Any, tensors), storage_data=where, storage_meta=StorageMeta())
    packed = io.BytesIO()
    torch.save(dict(common), packed)
    return {
        METADATA_FILE: write_file(folder / METADATA_FILE, pickle.dumps(metadata)),
        COMMON_FILE: write_file(folder / COMMON_FILE, packed.getvalue()),
        CONFIG_FILE: write_file(folder / CONFIG_FILE, json.dumps(FORMAT | _COMMON).encode()),
    }


def read_description(folder: Path) -> Metadata:
    """The description of a checkpoint.

    Raises:
        CheckpointError: there is none, or a damaged one, or one of another format.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: is no Megatron distributed checkpoint (no {CONFIG_FILE})")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with (folder / METADATA_FILE).open("rb") as file:
            metadata = pickle.load(file)
        _ = metadata.state_dict_metadata, metadata.storage_data
    except Exception as error:  # it is unpickled: damage shows as anything
        raise CheckpointError(f"{folder}: no checkpoint, or a damaged one: {one_line(error)}") from error
    if {key: config.get(key) for key in FORMAT} != FORMAT:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} says {config}, only {FORMAT} is read")
    return metadata


def read_chunks(folder: Path, metadata: Metadata, wanted: Sequence[StoredChunk]) -> None:
    """Reads rectangles of stored tensors into tensors; every stored chunk that is needed is read once.

    Args:
        folder: the checkpoint.
        metadata: its description.
        wanted: where to put what; a rectangle that reaches beyond its stored tensor keeps what it holds there.

    Raises:
        CheckpointError: a file is damaged.
    """
    by_key: dict[str, list[StoredChunk]] = defaultdict(list)
    for chunk in wanted:
        by_key[chunk.key].append(chunk)
    needed: dict[str, list[tuple[_StorageInfo, ChunkStorageMetadata, list[StoredChunk]]]] = defaultdict(list)
    where = cast(Mapping[MetadataIndex, _StorageInfo], metadata.storage_data)
    for key, targets in by_key.items():
        stored = cast(TensorStorageMetadata, metadata.state_dict_metadata[key])
        for chunk in stored.chunks:
            if touched := [target for target in targets if _common_box(chunk, target) is not None]:
                place = where[MetadataIndex(key, chunk.offsets)]
                needed[place.relative_path].append((place, chunk, touched))
    for name, reads in needed.items():
        with _opened(folder, name) as file:
            for place, chunk, targets in sorted(reads, key=lambda read: read[0].offset):
                content = _load(folder, file, place, chunk, targets[0].key)
                for target in targets:
                    _copy_common(content, chunk, target)


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _opened(folder: Path, name: str) -> BinaryIO:
    try:
        return (folder / name).open("rb")
    except OSError as error:
        raise CheckpointError(f"{folder}: damaged: {name}: {error.strerror}") from error


def _load(folder: Path, file: BinaryIO, place: _StorageInfo, chunk: ChunkStorageMetadata, key: str) -> Tensor:
    try:
        file.seek(place.offset)
        tensor = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
    except Exception as error:  # torch unzips and unpickles: damage shows as anything
        raise CheckpointError(f"{folder}: damaged: {key} in {place.relative_path}: {one_line(error)}") from error
    if tensor.shape != chunk.sizes:
        raise CheckpointError(f"{folder}: damaged: {key} in {place.relative_path} has shape {tuple(tensor.shape)}")
    return tensor


def _common_box(chunk: ChunkStorageMetadata, target: StoredChunk) -> list[tuple[int, int]] | None:
    """Start and stop in every dimension of the stored tensor of what both rectangles cover; None: nothing."""
    box = []
    for start, size, wanted, length in zip(
        chunk.offsets, chunk.sizes, target.offsets, target.tensor.shape, strict=True
    ):
        low, high = max(start, wanted), min(start + size, wanted + length)
        if low >= high:
            return None
        box.append((low, high))
    return box


def _copy_common(content: Tensor, chunk: ChunkStorageMetadata, target: StoredChunk) -> None:
    box = _common_box(chunk, target)
    assert box is not None
    source = tuple(slice(low - start, high - start) for (low, high), start in zip(box, chunk.offsets, strict=True))
    goal = tuple(slice(low - start, high - start) for (low, high), start in zip(box, target.offsets, strict=True))
    target.tensor[goal].copy_(content[source])
