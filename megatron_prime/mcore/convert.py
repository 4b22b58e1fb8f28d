"""Hugging Face folders to Megatron distributed checkpoints and back, at any layout.

A Megatron checkpoint made here is self-contained: beside the weights it keeps the Hugging Face
``config.json`` and tokenizer in ``hf/``, from which the way back is built.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_prime import world
from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.parallel import Layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder, HfWriter

SIDE_FOLDER = "hf"


def _role(hf_folder: Path, model: ModelSection, parallel: ParallelSection, layout: Layout) -> ModelRole:
    return ModelRole(
        RoleSetup(
            architecture=read_architecture(hf_folder),
            model=model,
            parallel=parallel,
            micro_batch=MicroBatchSection(micro_batch_size=1),
            layout=layout,
        )
    )


@on_megatron_platform
def to_megatron(source: Path, target: Path, *, dtype: str, parallel: ParallelSection, layout: Layout) -> None:
    """Writes a Hugging Face folder as a Megatron distributed checkpoint.

    Args:
        source: folder with config.json and safetensors weights.
        target: new or empty folder.
        dtype: ``float32`` or ``bfloat16``.
        parallel, layout: the running layout; the checkpoint loads at any other.

    Raises:
        WeightsError: the folder's weights are incomplete, misshapen or damaged; nothing is written.
        CheckpointError: the target holds something.
    """
    from megatron.core import dist_checkpointing

    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target}: is not empty; choose a new folder")
    folder = HfFolder(source)
    folder.validate(read_architecture(source))
    role = _role(source, ModelSection(path=str(source), dtype=dtype), parallel, layout)  # type: ignore[arg-type]
    role.load_hf(folder)
    writing = target.with_name(target.name + ".writing")
    if world.is_main():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    world.barrier()
    dist_checkpointing.save({"model": role.gpt.sharded_state_dict()}, str(writing))
    world.barrier()
    if world.is_main():
        shutil.copytree(source, writing / SIDE_FOLDER, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", ".*"))
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
    world.barrier()


@on_megatron_platform
def to_hf(
    source: Path, target: Path, *, like: Path | None, dtype: str, parallel: ParallelSection, layout: Layout
) -> None:
    """Writes the weights of a Megatron distributed checkpoint as a Hugging Face folder.

    Args:
        source: made by `to_megatron`, or a model of a run's checkpoint (``.../step_00000010/policy``).
        target: new folder.
        like: Hugging Face folder whose config.json and tokenizer to use; None: the checkpoint's own.
        dtype: ``float32`` or ``bfloat16``.
        parallel, layout: the running layout, any.

    Raises:
        CheckpointError: the source is no checkpoint, or says not of which model.
    """
    from megatron.core import dist_checkpointing

    if not dist_checkpointing.check_is_distributed_checkpoint(str(source)):
        raise CheckpointError(f"{source}: is no Megatron distributed checkpoint (no metadata.json)")
    side = like or source / SIDE_FOLDER
    if not (side / "config.json").exists():
        raise CheckpointError(f"{source}: does not say which model it is; pass --like with its Hugging Face folder")
    role = _role(side, ModelSection(path=str(side), dtype=dtype), parallel, layout)  # type: ignore[arg-type]
    state: Any = dist_checkpointing.load({"model": role.gpt.sharded_state_dict()}, str(source))
    role.gpt.load_state_dict(state["model"])
    export_hf(role, target, side)


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
