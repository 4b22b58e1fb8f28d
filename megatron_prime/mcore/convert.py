"""Hugging Face folders to Megatron distributed checkpoints and back, at any layout.

A Megatron checkpoint made here is self-contained: beside the weights it keeps the Hugging Face
``config.json`` and tokenizer in ``hf/``, from which the way back is built.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_prime import world
from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.checkpoint import load_state, save_state
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.parallel import Layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.hf_folder import HfFolder, HfWriter

SIDE_FOLDER = "hf"
_EMBEDDING = "embedding.word_embeddings.weight"
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def _role(hf_folder: Path, dtype: str, parallel: ParallelSection, layout: Layout) -> ModelRole:
    return ModelRole(
        RoleSetup(
            architecture=read_architecture(hf_folder),
            model=ModelSection(path=str(hf_folder), dtype=dtype),  # type: ignore[arg-type]
            parallel=parallel,
            micro_batch=MicroBatchSection(micro_batch_size=1),
            layout=layout,
        )
    )


def _refuse_existing(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose a new folder")


@on_megatron_platform
def to_megatron(source: Path, target: Path, *, dtype: str | None, parallel: ParallelSection, layout: Layout) -> None:
    """Writes a Hugging Face folder as a Megatron distributed checkpoint.

    Args:
        source: folder with config.json and safetensors weights.
        target: new or empty folder.
        dtype: ``float32``, ``bfloat16``, or None for bfloat16 where all weights are stored so, else float32.
        parallel, layout: the running layout; the checkpoint loads at any other.

    Raises:
        WeightsError: the folder's weights are incomplete, misshapen or damaged; nothing is written.
        CheckpointError: the target holds something, or cannot be written.
    """
    _refuse_existing(target)
    folder = HfFolder(source)
    architecture = read_architecture(source)
    folder.validate(architecture)
    stored = {folder.dtype(name) for spec in weight_specs(architecture) for name in spec.hf_names}
    role = _role(source, dtype or _name_of(stored), parallel, layout)
    role.load_hf(folder)
    writing = target.with_name(target.name + ".writing")
    if world.is_main():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    world.barrier()
    try:
        save_state({"model": role.gpt.sharded_state_dict()}, writing)
        world.barrier()
        if world.is_main():
            _copy_side_files(source, writing / SIDE_FOLDER)
            shutil.rmtree(target, ignore_errors=True)
            writing.rename(target)
    finally:
        if world.is_main():
            shutil.rmtree(writing, ignore_errors=True)
    world.barrier()


def _copy_side_files(source: Path, target: Path) -> None:
    """Copies config.json, tokenizer and licence; weights of any format and folders stay behind."""
    target.mkdir()
    for file in source.iterdir():
        described = file.suffix in _SIDE_SUFFIXES or file.name.startswith(("LICENSE", "NOTICE"))
        if file.is_file() and described and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def _name_of(stored: set[torch.dtype]) -> str:
    return "bfloat16" if stored == {torch.bfloat16} else "float32"


@on_megatron_platform
def to_hf(
    source: Path, target: Path, *, like: Path | None, dtype: str | None, parallel: ParallelSection, layout: Layout
) -> None:
    """Writes the weights of a Megatron distributed checkpoint as a Hugging Face folder.

    Args:
        source: made by `to_megatron`, or a model of a run's checkpoint (``.../step_00000010/policy``).
        target: new folder.
        like: Hugging Face folder whose config.json and tokenizer to use; None: the checkpoint's own.
        dtype: ``float32``, ``bfloat16``, or None for what the checkpoint holds.
        parallel, layout: the running layout, any.

    Raises:
        CheckpointError: the source is no checkpoint, damaged, of another model, or says not of which; or the
            target holds something.
    """
    _refuse_existing(target)
    if not (source / "metadata.json").is_file():
        raise CheckpointError(f"{source}: is no Megatron distributed checkpoint (no metadata.json)")
    side = like or source / SIDE_FOLDER
    if not (side / "config.json").exists():
        raise CheckpointError(f"{source}: does not say which model it is; pass --like with its Hugging Face folder")
    stored = _stored_weights(source)
    role = _role(side, dtype or _name_of({tensor.dtype for tensor in stored.values()}), parallel, layout)
    num_rows = stored[_EMBEDDING].global_shape[0] if _EMBEDDING in stored else 0
    if num_rows < role.architecture.vocab_size:
        raise CheckpointError(
            f"{source}: holds {num_rows} rows of the embedding, {side}/config.json says"
            f" {role.architecture.vocab_size}; it is of another model"
        )
    state = load_state({"model": role.gpt.sharded_state_dict()}, source)
    role.gpt.load_state_dict(state["model"])
    export_hf(role, target, side)


def _stored_weights(source: Path) -> dict[str, Any]:
    """Megatron's descriptions of a checkpoint's weights, by name."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    try:
        stored = load_tensors_metadata(str(source))
    except Exception as error:  # torch unpickles it: damage shows as anything
        raise CheckpointError(f"{source}: no checkpoint, or a damaged one: {error}") from error
    return {name: tensor for name, tensor in stored.items() if not name.startswith("optimizer.")}


def export_hf(role: ModelRole, target: Path, source_folder: Path) -> None:
    """Writes a role's weights as a Hugging Face folder; every rank calls it, the main one writes.

    Args:
        role: the model.
        target: new folder, or one to replace.
        source_folder: where config.json and tokenizer come from.
    """
    stream = role.export_weights()
    if not world.is_main():
        for _ in stream:
            pass
    else:
        dtype = next(role.gpt.parameters()).dtype
        with HfWriter(target, source_folder, role.architecture, dtype, overwrite=True) as writer:
            for name, tensor in stream:
                writer.add(name, tensor)
    world.barrier()
