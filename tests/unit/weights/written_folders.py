"""Hugging Face folders that `HfWriter` has written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_writer import HfWriter


def export(
    source: Path,
    target: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 10**9,
    overwrite: bool = False,
) -> None:
    """Writes the weights of a folder with one file into another folder."""
    weights = load_file(source / "model.safetensors")
    architecture = read_architecture(source)
    with HfWriter(target, source, architecture, dtype, max_shard_bytes, overwrite=overwrite) as writer:
        for name, tensor in weights.items():
            writer.add(name, tensor)
