"""Reading and writing Hugging Face model folders (safetensors, one file or sharded with an index)."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.layouts import Slices

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
"""Buffers that old exports carry; they follow from the configuration."""
_HEAD = "lm_head.weight"
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
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
"""What goes from the source folder to an exported one besides weights and `config.json`."""


class HfFolder:
    """The weights of a model folder, memory-mapped: opening reads headers, `fetch` reads a slice.

    Args:
        path: folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises:
        WeightsError: there are no safetensors weights, or the index is damaged. Missing and damaged shards are
            reported by `validate`, together with everything else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._problems: list[str] = []
        self._files: dict[str, Any] = {}
        self._location: dict[str, str] = {}
        if (self.path / _SINGLE_FILE).exists():
            self._open(_SINGLE_FILE)
            for file, handle in self._files.items():
                self._location = dict.fromkeys(handle.keys(), file)
        else:
            self._location = self._read_index()
            for file in sorted(set(self._location.values())):
                self._open(file)
            contents = {file: set(handle.keys()) for file, handle in self._files.items()}
            # A tensor that the index promises and its shard lacks is missing, and `validate` says so.
            self._location = {
                name: file for name, file in self._location.items() if name in contents.get(file, (name,))
            }

    def names(self) -> list[str]:
        """Names of all readable tensors, sorted."""
        return sorted(name for name, file in self._location.items() if file in self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Floating-point type of a tensor, from its file's header."""
        stored = self._slice(name).get_dtype()
        if stored not in _FLOAT_DTYPES:
            raise WeightsError(f"{self._where(name)}: stored as {stored}, not as floating-point numbers")
        return _FLOAT_DTYPES[stored]

    def fetch(self, name: str, slices: Slices) -> Tensor:
        """Part of a tensor, on the CPU and as stored; the rest of it is not read.

        Args:
            name: Hugging Face name.
            slices: one `slice` per dimension.

        Returns:
            The part; it may be a view of the mapped file, so copy it before changing it.

        Raises:
            WeightsError: there is no such tensor.
        """
        return self._slice(name)[slices]

    def validate(self, architecture: ModelArchitecture) -> None:
        """Checks that the folder has exactly the weights of a model, before anything is built from it.

        Args:
            architecture: the model.

        Raises:
            WeightsError: one line per missing, damaged or inconsistent file, and per missing, extra, misshapen or
                non-floating-point tensor.
        """
        problems = list(self._problems)
        expected = _expected_shapes(architecture)
        present = set(self.names())
        # Tensors of a file that could not be opened are covered by the file's own line.
        unreadable = set(self._location) - present
        if self._files or not problems:
            problems += [f"{self.path}: {name}: missing" for name in expected if name not in present | unreadable]
        for name in self.names():
            if name in expected:
                problems += self._tensor_problems(name, expected[name])
            elif not (name.endswith(_HARMLESS_SUFFIX) or (name == _HEAD and architecture.tied_embeddings)):
                problems.append(f"{self._where(name)}: not a weight of this {architecture.family} architecture")
        if problems:
            raise WeightsError("\n".join(problems))

    def _tensor_problems(self, name: str, expected: tuple[int, ...]) -> list[str]:
        problems = []
        if self.shape(name) != expected:
            problems.append(f"{self._where(name)}: has shape {self.shape(name)}, config.json says {expected}")
        stored = self._slice(name).get_dtype()
        if stored not in _FLOAT_DTYPES:
            problems.append(f"{self._where(name)}: stored as {stored}, not as floating-point numbers")
        return problems

    def _open(self, file: str) -> None:
        try:
            self._files[file] = safe_open(str(self.path / file), framework="pt")
        except FileNotFoundError:
            self._problems.append(f"{self.path / file}: missing; {_INDEX_FILE} names it")
        except (SafetensorError, OSError) as error:
            self._problems.append(f"{self.path / file}: damaged or truncated: {error}")

    def _read_index(self) -> dict[str, str]:
        path = self.path / _INDEX_FILE
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except FileNotFoundError:
            raise WeightsError(
                f"{self.path}: has neither {_SINGLE_FILE} nor {_INDEX_FILE}; other formats are not read: "
                "save the model with transformers' save_pretrained first"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path}: cannot be read as a safetensors index: {error!r}") from error
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise WeightsError(f"{path}: weight_map must map tensor names to file names")
        return weight_map

    def _slice(self, name: str) -> Any:
        file = self._location.get(name)
        if file not in self._files:
            raise WeightsError(f"{self.path}: {name}: no such tensor")
        return self._files[file].get_slice(name)

    def _where(self, name: str) -> str:
        return f"{self.path / self._location[name]}: {name}"


class HfWriter:
    """Writes a model folder that transformers loads, in bounded memory, all or nothing.

    Used as a context manager. Everything goes to a hidden sibling folder that takes the final name when the
    block ends; an error, or a weight that was not added, leaves the target as it was.

    Args:
        path: folder to make.
        source_folder: where tokenizer, generation configuration and licence files are copied from.
        architecture: the model; its `hf_config` becomes `config.json`.
        dtype: what weights are stored as.
        max_shard_bytes: a file holds no more than this (a larger tensor has a file of its own); also the host
            memory that the writer needs.
        overwrite: replace a folder that is there.

    Raises:
        WeightsError: the target exists and is not empty.
    """

    def __init__(
        self,
        path: str | Path,
        source_folder: str | Path,
        architecture: ModelArchitecture,
        dtype: torch.dtype,
        max_shard_bytes: int = 5 * 10**9,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.source_folder = Path(source_folder)
        self.architecture = architecture
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self.overwrite = overwrite
        self._expected = _expected_shapes(architecture)
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._refuse_existing()
        self._partial = self.path.absolute().parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"

    def __enter__(self) -> HfWriter:
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one weight; it is copied, so it may change afterwards.

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
        num_bytes = tensor.numel() * self.dtype.itemsize
        if self._pending and self._pending_bytes + num_bytes > self.max_shard_bytes:
            self._flush()
        del self._expected[name]
        self._pending[name] = tensor.detach().to("cpu", self.dtype, copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += num_bytes

    def _flush(self) -> None:
        save_file(self._pending, self._partial / f"{len(self._shards)}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending = {}
        self._pending_bytes = 0

    def _finish(self) -> None:
        if self._expected:
            raise WeightsError("\n".join(f"{self.path}: {name}: was never added" for name in self._expected))
        self._flush()
        self._name_shards()
        self._write_json("config.json", self._config())
        for pattern in _COPIED:
            for file in self.source_folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, self._partial / file.name)
        self._commit()

    def _name_shards(self) -> None:
        num_shards = len(self._shards)
        files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
        if num_shards == 1:
            files = [_SINGLE_FILE]
        for i, file in enumerate(files):
            (self._partial / f"{i}.safetensors").rename(self._partial / file)
        if num_shards > 1:
            weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_json(_INDEX_FILE, index)

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
            replaced = self._partial.with_suffix(".replaced")
            os.rename(self.path, replaced)
            os.rename(self._partial, self.path)
            shutil.rmtree(replaced)
        else:
            os.rename(self._partial, self.path)


def _expected_shapes(architecture: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for spec in weight_specs(architecture)
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }
