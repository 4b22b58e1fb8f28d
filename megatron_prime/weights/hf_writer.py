"""Writing Hugging Face model folders (safetensors, one file or sharded with an index)."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_prime.checkpoint.journal import Journal
from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.hf_folder import FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE, expected_shapes

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_HEADER_ALIGNMENT = 8
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files copied from the source folder to an exported one besides weights and `config.json`."""


def plan_shards(shapes: Mapping[str, Sequence[int]], itemsize: int, max_shard_bytes: int) -> dict[str, list[str]]:
    """Assigns tensors to files.

    Args:
        shapes: of the tensors, in order.
        itemsize: bytes of a number.
        max_shard_bytes: a file holds no more than this; a larger tensor has a file of its own.

    Returns:
        File name to tensor names.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


class _ShardFile:
    """A safetensors file whose tensors are written in any order, each straight to its place.

    Args:
        path: new file, or one that was begun.
        shapes: of all its tensors.
        dtype: of all its tensors.
        written: tensors that it holds already.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, written: Collection[str] = ()
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        # All offsets are known from the shapes, so the header can be written first and tensors in any order.
        for name in sorted(shapes):
            self._offsets[name] = end
            end += math.prod(shapes[name]) * dtype.itemsize
            offsets = [self._offsets[name], end]
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._start = 8 + len(text)
        self._file: BinaryIO = path.open("r+b" if written else "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        for name in written:
            del self._offsets[name]

    def write(self, name: str, tensor: Tensor) -> tuple[int, int]:
        """Writes one tensor; returns where it begins and its CRC-32."""
        start = self._start + self._offsets.pop(name)
        self._file.seek(start)
        data = tensor.flatten().view(torch.uint8).numpy().data
        self._file.write(data)
        self._file.flush()
        return start, zlib.crc32(data)

    @property
    def is_whole(self) -> bool:
        """True if nothing is left to write."""
        return not self._offsets

    def close(self) -> None:
        """Ends the file; a whole one is safe on disk then."""
        if not self._file.closed and not self._offsets:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


class HfWriter:
    """Writes a model folder that transformers loads, one tensor in memory at a time, all or nothing.

    Used as a context manager. Everything goes to a hidden sibling folder that takes the final name when the
    block ends; an error, or a weight that was not added, leaves the target as it was. With a journal, what was written
    until then stays in the journal's folder, and the next writer with the same one begins with it.

    Args:
        path: folder to make.
        source_folder: where tokenizer, generation configuration and licence files are copied from.
        architecture: the model; its `hf_config` becomes `config.json`.
        dtype: what weights are stored as.
        max_shard_bytes: a file holds no more than this (a larger tensor has a file of its own).
        overwrite: replace an existing folder.
        journal: of a sibling of the target.

    Raises:
        WeightsError: the target exists and is not empty.
    """

    def __init__(
        self,
        path: str | Path,
        source_folder: str | Path,
        architecture: ModelArchitecture,
        dtype: torch.dtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        overwrite: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self.path = Path(path)
        self.source_folder = Path(source_folder)
        self.architecture = architecture
        self.dtype = dtype
        self.overwrite = overwrite
        self._shapes = expected_shapes(architecture)
        self._expected = dict(self._shapes)
        self._shards = plan_shards(self._shapes, dtype.itemsize, max_shard_bytes)
        self._shard_of = {name: file for file, names in self._shards.items() for name in names}
        self._open: dict[str, _ShardFile] = {}
        self._total_bytes = 0
        self._refuse_existing()
        self._journal = journal
        hidden = self.path.absolute().parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        self._partial = journal.folder if journal else hidden
        self.written = frozenset(part["name"] for part in journal.parts) if journal else frozenset()
        """Tensors that are written already; adding them again is an error."""
        for name in self.written:
            self._total_bytes += math.prod(self._expected.pop(name)) * dtype.itemsize

    def __enter__(self) -> HfWriter:
        if self._journal is None:
            self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._open.values():
                file.close()
            if self._journal is None:
                shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one weight; it may change afterwards.

        Args:
            name: Hugging Face name.
            tensor: the whole tensor, on any device.

        Raises:
            WeightsError: not a weight of the architecture, added before, or of another shape.
        """
        if name not in self._expected:
            raise WeightsError(f"{self.path}: {name}: unknown to this {self.architecture.family} model, or added twice")
        if tuple(tensor.shape) != self._expected[name]:
            raise WeightsError(f"{self.path}: {name}: shape {tuple(tensor.shape)}, expected {self._expected[name]}")
        file = self._shard_of[name]
        if file not in self._open:
            shapes = {other: self._shapes[other] for other in self._shards[file]}
            written = [other for other in shapes if other in self.written]
            self._open[file] = _ShardFile(self._partial / file, shapes, self.dtype, written)
        stored = tensor.detach().to("cpu", self.dtype).contiguous()
        start, crc32 = self._open[file].write(name, stored)
        if self._journal:
            self._journal.note({"file": file, "start": start, "length": stored.nbytes, "crc32": crc32, "name": name})
        if self._open[file].is_whole:
            self._open[file].close()
        del self._expected[name]
        self._total_bytes += stored.nbytes

    def _finish(self) -> None:
        if self._expected:
            raise WeightsError("\n".join(f"{self.path}: {name}: was never added" for name in self._expected))
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(self._shard_of.items()))}
            self._write_json(INDEX_FILE, index)
        self._write_json("config.json", self._config())
        for pattern in _COPIED:
            for file in self.source_folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, self._partial / file.name)
        if self._journal:
            self._journal.finish()
        self._commit()

    def _config(self) -> dict[str, Any]:
        config = dict(self.architecture.hf_config)
        config["architectures"] = [_ARCHITECTURES[self.architecture.family]]
        # transformers 5 writes `dtype`; older versions read `torch_dtype` only, and 5 still reads it.
        dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        return config | dict.fromkeys(dtype_keys, str(self.dtype).removeprefix("torch."))

    def _write_json(self, file: str, content: dict[str, Any]) -> None:
        (self._partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise WeightsError(f"{self.path}: exists and is not a folder; choose another path")
        if not self.overwrite and self.path.is_dir() and any(self.path.iterdir()):
            raise WeightsError(f"{self.path}: exists and is not empty; choose another path or overwrite it explicitly")

    def _commit(self) -> None:
        self._refuse_existing()
        if self.overwrite and self.path.is_dir():
            # Two renames instead of removing first: a crash in between leaves either the old or the new folder whole.
            replaced = self._partial.with_suffix(".replaced")
            os.rename(self.path, replaced)
            os.rename(self._partial, self.path)
            shutil.rmtree(replaced)
        else:
            os.rename(self._partial, self.path)
