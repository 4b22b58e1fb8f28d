"""A role's weights as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megatron_prime import collectives
from megatron_prime.mcore.role import ModelRole
from megatron_prime.weights.hf_writer import HfWriter


def export_hf(role: ModelRole, target: Path, source_folder: Path) -> None:
    """Writes a role's weights as a Hugging Face folder; every rank calls it, the main one writes.

    Args:
        role: the model.
        target: new folder, or one to replace.
        source_folder: where config.json and tokenizer come from.
    """
    stream = role.export_weights()
    if not collectives.is_main():
        for _ in stream:
            pass
    else:
        dtype = role.config.params_dtype
        with HfWriter(target, source_folder, role.architecture, dtype, overwrite=True) as writer:
            for name, tensor in stream:
                writer.add(name, tensor)
    collectives.barrier()
