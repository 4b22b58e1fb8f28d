"""Reading Hugging Face model folders (safetensors, one file or sharded with an index)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.sharding import Slices

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
"""Buffers that old exports carry; they follow from the configuration."""
_HEAD = "lm_head.weight"


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
        if (self.path / SINGLE_FILE).exists():
            self._open(SINGLE_FILE)
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
        if stored not in FLOAT_DTYPES:
            raise WeightsError(f"{self._where(name)}: stored as {stored}, not as floating-point numbers")
        return FLOAT_DTYPES[stored]

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

    def release(self) -> None:
        """Gives back the memory of what was read: touched pages of a mapped file count as this process's.

        Tensors that `fetch` returned stay valid, and keep their pages.
        """
        for file in self._files:
            self._files[file] = safe_open(str(self.path / file), framework="pt")

    def validate(self, architecture: ModelArchitecture) -> None:
        """Checks that the folder has exactly the weights of a model, before anything is built from it.

        Args:
            architecture: the model.

        Raises:
            WeightsError: one line per missing, damaged or inconsistent file, and per missing, extra, misshapen or
                non-floating-point tensor.
        """
        problems = list(self._problems)
        expected = expected_shapes(architecture)
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
        if stored not in FLOAT_DTYPES:
            problems.append(f"{self._where(name)}: stored as {stored}, not as floating-point numbers")
        return problems

    def _open(self, file: str) -> None:
        try:
            self._files[file] = safe_open(str(self.path / file), framework="pt")
        except FileNotFoundError:
            self._problems.append(f"{self.path / file}: missing; {INDEX_FILE} names it")
        except (SafetensorError, OSError) as error:
            self._problems.append(f"{self.path / file}: damaged or truncated: {error}")

    def _read_index(self) -> dict[str, str]:
        path = self.path / INDEX_FILE
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except FileNotFoundError:
            raise WeightsError(
                f"{self.path}: has neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read: "
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


def expected_shapes(architecture: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of a model, in the order of `weight_specs`."""
    return {
        name: shape
        for spec in weight_specs(architecture)
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }
