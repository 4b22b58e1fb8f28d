"""Checkpoints of a run: Megatron's distributed format for models and optimizers, plus the trainer's state.

A checkpoint is written to ``step_00000010.writing`` and renamed when every rank has finished and the
manifest is on disk, so a folder without ``.writing`` is complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prime import world
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.role import TrainableRole

logger = logging.getLogger(__name__)

_WRITING = ".writing"
_MANIFEST = "manifest.json"
_TRAINER_STATE = "trainer.pt"
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


@contextlib.contextmanager
def _written_by_this_process() -> Iterator[None]:
    """Lets Megatron's writer work in this process instead of in forked ones.

    A forked writer that dies leaves the save waiting for ever, and a fork copies whatever locks other
    threads (gloo's, OpenMP's) hold; the spawned queue beside it costs seconds per run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync

    def write(
        transforms: list[Any], use_msc: bool, rank: int, buckets: Sequence[Any], results: queue.Queue[Any]
    ) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            finished: queue.Queue[Any] = queue.Queue()
            open_tasks: queue.Queue[int] = queue.Queue()
            open_tasks.put(index)
            writer.write_preloaded_data(transforms, index, bucket, finished, open_tasks, use_fsync=True)  # pyright: ignore[reportArgumentType]
            _, outcome = finished.get_nowait()
            if isinstance(outcome, Exception):
                results.put(outcome)
                return
            written[index] = outcome
        results.put(written)

    with (
        mock.patch.object(writer, "write_preloaded_data_multiproc", staticmethod(write)),
        mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue),
    ):
        yield


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes a sharded state as a distributed checkpoint; collective, inside `megatron_platform`.

    Args:
        state: what Megatron's ``sharded_state_dict`` methods return, by part (``model``, ``optimizer``, ...).
        path: empty folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    from megatron.core import dist_checkpointing

    try:
        with _written_by_this_process():
            dist_checkpointing.save(state, str(path))
    except (Exception, CheckpointException) as error:  # the writers raise whatever their workers raised
        raise CheckpointError(
            f"{path}: cannot be written: {_reason(error)}; free space or choose another folder"
        ) from error


def load_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Reads a distributed checkpoint into a sharded state; collective, inside `megatron_platform`.

    Args:
        state: as for `save_state`; without an ``optimizer`` that of the checkpoint is left out.
        path: the checkpoint.

    Returns:
        The parts, ready for the ``load_state_dict`` methods.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    from megatron.core import dist_checkpointing

    try:
        result: Any = dist_checkpointing.load(state, str(path), strict="return_all")
    except (Exception, CheckpointException) as error:  # torch unzips and unpickles: damage shows as anything
        raise CheckpointError(f"{path}: damaged, or of another model: {_reason(error)}") from error
    loaded, unasked, absent = result
    kept_out = () if "optimizer" in state else ("optimizer.",)
    problems = [f"{path}: {key}: missing" for key in sorted(absent)]
    problems += [
        f"{path}: {key}: not a weight of this model" for key in sorted(unasked) if not key.startswith(kept_out)
    ]
    problems = [problem for problem in problems if "_extra_state" not in problem]
    if problems:
        raise CheckpointError("\n".join(problems))
    return loaded


def _reason(error: BaseException) -> str:
    """One line; torch wraps the error of each rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@on_megatron_platform
def load_model(role: TrainableRole, path: Path) -> None:
    """Loads a role's weights, without optimizer, from its part of a checkpoint of any layout; collective.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    role.load_sharded_state(load_state({"model": role.sharded_state(dict(_OPTIMIZER_METADATA))}, path)["model"])


class Checkpointer:
    """Saves and restores the trained models of a run.

    Args:
        folder: holds one folder per checkpoint.
        roles: trained models by name (``policy``, ``prm``, ``model``).
        layout: sizes written into the manifest; optimizer states only load at the same layout.
        keep_last: complete checkpoints to keep.
    """

    def __init__(
        self, folder: Path, roles: Mapping[str, TrainableRole], layout: Mapping[str, int], keep_last: int
    ) -> None:
        self.folder = folder
        self.roles = roles
        self.layout = dict(layout)
        self.keep_last = keep_last

    @on_megatron_platform
    def save(self, step: int, trainer_state: Mapping[str, Any]) -> None:
        """Writes a checkpoint and then removes those that are too old.

        Args:
            step: steps done.
            trainer_state: picklable, the same on every rank.

        Raises:
            CheckpointError: it could not be written; nothing older was removed.
        """
        final = self.folder / f"step_{step:08d}"
        writing = final.with_name(final.name + _WRITING)
        if world.is_main():
            shutil.rmtree(writing, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            for name in self.roles:
                (writing / name).mkdir(parents=True)
        world.barrier()
        for name, role in self.roles.items():
            save_state(self._state(role, loading=False), writing / name)
        world.barrier()
        if world.is_main():
            torch.save(dict(trainer_state), writing / _TRAINER_STATE)
            manifest = {"step": step, "layout": self.layout, "roles": sorted(self.roles)}
            (writing / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            writing.rename(final)
            for old in self.complete()[: -self.keep_last]:
                shutil.rmtree(old)
        world.barrier()

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.suffix != _WRITING and (p / _MANIFEST).exists())

    def newest_step(self) -> int:
        """Steps done at the newest complete checkpoint, 0 without one."""
        found = self.complete()
        return int(found[-1].name.removeprefix("step_")) if found else 0

    @on_megatron_platform
    def restore(self) -> Mapping[str, Any] | None:
        """Loads the newest complete checkpoint into the models.

        Returns:
            The trainer's state, or None where there is no checkpoint.

        Raises:
            CheckpointError: it was written at another parallel layout or for other models.
        """
        found = self.complete()
        if not found:
            return None
        newest = found[-1]
        manifest = json.loads((newest / _MANIFEST).read_text())
        if manifest["layout"] != self.layout:
            raise CheckpointError(
                f"{newest}: written at layout {manifest['layout']}, this run has {self.layout}; resume at the old "
                "layout, or start a new run.name from the exported model"
            )
        if manifest["roles"] != sorted(self.roles):
            raise CheckpointError(
                f"{newest}: holds {manifest['roles']}, this run trains {sorted(self.roles)}; "
                "advantage.process_coef must stay what it was"
            )
        for name, role in self.roles.items():
            self._load(role, newest / name)
        # Written by this class: the trainer's dataclasses need the full unpickler.
        return torch.load(newest / _TRAINER_STATE, weights_only=False)

    def _load(self, role: TrainableRole, path: Path) -> None:
        from megatron_prime.mcore.optimizer import allocate_states, restore_step_counts

        allocate_states(role.optimizer)
        state = load_state(self._state(role, loading=True), path)
        role.load_sharded_state(state["model"])
        role.optimizer.load_state_dict(state["optimizer"])
        role.scheduler.load_state_dict(state["scheduler"])
        restore_step_counts(role.optimizer, role.scheduler.num_steps)

    @staticmethod
    def _state(role: TrainableRole, *, loading: bool) -> dict[str, Any]:
        # Megatron adds the current process group to the mapping it is given.
        metadata = dict(_OPTIMIZER_METADATA)
        model = role.sharded_state(metadata)
        return {
            "model": model,
            "optimizer": role.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "scheduler": role.scheduler.state_dict(),
        }
