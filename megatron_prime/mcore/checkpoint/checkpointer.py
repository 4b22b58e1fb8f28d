"""Saves checkpoints: copies the states, lets training continue, and writes and commits the copy in a thread."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime import collectives
from megatron_prime.checkpoint.manifest import (
    WRITING,
    FileRecord,
    Manifest,
    commit,
    committed,
    remove,
    step_folder,
    step_of,
    superseded,
    write_file,
)
from megatron_prime.checkpoint.torch_dist import StoredChunk, WrittenFile, file_name, write_chunks, write_description
from megatron_prime.config.schema import CheckpointSection
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.checkpoint.resume import identity_of
from megatron_prime.mcore.checkpoint.state import load_training_state, model_chunks, optimizer_chunks, step_count
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.export import export_hf
from megatron_prime.mcore.residency import awake
from megatron_prime.mcore.role import TrainableRole
from megatron_prime.weights.conversion import SIDE_FOLDER, copy_side_files

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer.pt"
_PATIENCE = timedelta(hours=2)
"""Time limit for a rank that has finished writing to wait for the others."""


@dataclass(kw_only=True)
class _Job:
    """A checkpoint that is being written, and this rank's part of it."""

    step: int
    writing: Path
    accuracy: float | None
    chunks: Mapping[str, Iterator[StoredChunk]]
    """By role; memory of each chunk is its own."""
    commons: Mapping[str, Mapping[str, Any]]
    """By role, on the main process: what is the same on every rank."""
    trainer_state: bytes
    error: CheckpointError | None = None
    """Failure of the save, the same on every rank; None: none so far."""
    thread: threading.Thread | None = None


@dataclass(frozen=True, kw_only=True)
class _Report:
    """A rank's part of a save, as reported to the main process."""

    files: Mapping[str, WrittenFile] = field(default_factory=dict)
    error: str | None = None


class Checkpointer:
    """Saves and restores the trained models of a run.

    Args:
        folder: holds one folder per checkpoint.
        roles: trained models by name (``policy``, ``prm``, ``model``).
        section: what is kept, and how it is written.
        starts: Hugging Face folders with the models' config.json and tokenizer, by role.
        resume_from: checkpoint to continue from, known to be whole (`resume.find_checkpoint`); None: from the start.
    """

    def __init__(
        self,
        folder: Path,
        roles: Mapping[str, TrainableRole],
        section: CheckpointSection,
        starts: Mapping[str, str],
        resume_from: Path | None,
    ) -> None:
        self.folder = folder
        self.roles = roles
        self.section = section
        self.starts = starts
        self.resume_from = resume_from
        role = next(iter(roles.values()))
        layout = role.layout
        self._identity = identity_of({name: r.architecture for name, r in roles.items()}, role.setup.model.dtype)
        self._sizes = {"tp": layout.tp_size, "pp": layout.pp_size, "cp": layout.cp_size, "dp": layout.dp_size}
        # The writers talk among themselves while the main threads use the other groups.
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if collectives.world_size() > 1 else None
        self._mine: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
        self._pending: _Job | None = None

    @property
    def step(self) -> int:
        """Steps already done when this process starts; 0 for a new run."""
        return step_of(self.resume_from) if self.resume_from else 0

    def restore(self) -> Mapping[str, Any] | None:
        """Loads the checkpoint to continue from into the models.

        Returns:
            The trainer's state, or None where there is no checkpoint.

        Raises:
            CheckpointError: it was altered since it was checked.
        """
        if self.resume_from is None:
            return None
        self._restore_roles(self.resume_from)
        # Written by this class: the trainer's dataclasses need the full unpickler.
        saved = torch.load(self.resume_from / TRAINER_STATE, weights_only=False)
        if saved["step"] != self.step:
            raise CheckpointError(f"{self.resume_from}: {TRAINER_STATE} is of step {saved['step']}; remove the folder")
        return saved["state"]

    @on_megatron_platform
    def _restore_roles(self, checkpoint: Path) -> None:
        for name, role in self.roles.items():
            with awake(role):
                load_training_state(role.chunks, role.optimizer, role.scheduler, checkpoint / name)

    @on_megatron_platform
    def save(
        self,
        step: int,
        trainer_state: Mapping[str, Any],
        *,
        accuracy: float | None = None,
        background: bool = True,
    ) -> None:
        """Writes a checkpoint, in the background where `checkpoint.asynchronous` says so; collective.

        What is no longer to be kept is removed once it is committed.

        Args:
            step: steps done.
            trainer_state: picklable, the same on every rank.
            accuracy: of the evaluation after this step.
            background: training continues meanwhile; otherwise no copy of all states is made, and the checkpoint is
                committed when this returns.

        Raises:
            CheckpointError: this or the previous one could not be written; nothing older was removed.
        """
        self.finish()
        background = background and self.section.asynchronous
        job = self._prepare(step, trainer_state, accuracy, copies_all=background)
        self._make_folders(job.writing)
        self._pending = job
        if background:
            job.thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint {step}", daemon=True)
            job.thread.start()
        else:
            self._run(job)
            self.finish()
        every = self.section.every_steps * self.section.export_every_saves
        if every > 0 and step % every == 0:
            exports = step_folder(self.folder.parent / "exports", step)
            for name, role in self.roles.items():
                with awake(role):
                    export_hf(role, exports / name, Path(self.starts[name]))

    def check(self) -> None:
        """Asks without waiting whether what is being written has failed; collective.

        Raises:
            CheckpointError: on every process, if it has.
        """
        job = self._pending
        if job is not None and not collectives.any_process(job.thread is not None and job.thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Waits until what is being written is committed.

        Raises:
            CheckpointError: on every process, where it could not be.
        """
        job, self._pending = self._pending, None
        if job is None:
            return
        if job.thread is not None:
            job.thread.join()
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """Waits like `finish`, where another error is on its way: a failure is only logged."""
        try:
            self.finish()
        except CheckpointError as error:
            logger.error("%s", error)

    def _prepare(
        self, step: int, trainer_state: Mapping[str, Any], accuracy: float | None, *, copies_all: bool
    ) -> _Job:
        """Takes this rank's part of all states, as copies if training continues meanwhile."""
        chunks = {}
        for name, role in self.roles.items():
            # One after the other: `parallel.offload_idle` may leave no room for two.
            with awake(role):
                mine = self._my_chunks(name, role)
                chunks[name] = _consumed(list(_copies(mine))) if copies_all else _copies_of(role, mine)
        counts = collectives.all_gather({name: step_count(role.optimizer) for name, role in self.roles.items()})
        commons: dict[str, Mapping[str, Any]] = {}
        for name, role in self.roles.items():
            num_steps = next(count[name] for count in counts if count[name] is not None)
            commons[name] = {"optimizer": {"step": num_steps}, "scheduler": role.scheduler.state_dict()}
        packed = io.BytesIO()
        if collectives.is_main():
            torch.save({"step": step, "state": dict(trainer_state)}, packed)
        final = step_folder(self.folder, step)
        return _Job(
            step=step,
            writing=final.with_name(final.name + WRITING),
            accuracy=accuracy,
            chunks=chunks,
            commons=commons,
            trainer_state=packed.getvalue(),
        )

    def _my_chunks(self, name: str, role: TrainableRole) -> list[StoredChunk]:
        """Returns the chunks of a role that this rank writes; of several holders, the least busy one writes a chunk."""
        everything = model_chunks(role.chunks) + optimizer_chunks(role.chunks, role.optimizer)
        chunks = {(chunk.key, chunk.offsets): chunk for chunk in everything}
        if name not in self._mine:
            self._mine[name] = _share_out({place: chunk.tensor.nbytes for place, chunk in chunks.items()})
        return [chunk for place, chunk in chunks.items() if place in self._mine[name]]

    def _make_folders(self, writing: Path) -> None:
        problem = None
        if collectives.is_main():
            try:
                shutil.rmtree(writing, ignore_errors=True)
                for name in self.roles:
                    (writing / name).mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        problem = collectives.broadcast(problem)
        if problem is not None:
            raise self._failure(writing, problem)

    def _run(self, job: _Job) -> None:
        """Writes this rank's part; the main process then commits, or takes everything back."""
        try:
            problem = self._agreed(job, self._write(job))
        except Exception as error:  # in a thread it would go unseen: another rank is gone
            problem = f"the ranks lost each other: {error}"
        if problem is not None:
            job.error = self._failure(job.writing, problem)

    def _agreed(self, job: _Job, report: _Report) -> str | None:
        """Returns the problems of all ranks."""
        reports = self._gathered(report)
        problem = None
        if collectives.is_main():
            problem = "; ".join(f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.error) or None
            problem = problem or self._commit(job, reports)
            if problem is not None:
                shutil.rmtree(job.writing, ignore_errors=True)
        return self._broadcast(problem)

    def _write(self, job: _Job) -> _Report:
        try:
            name = file_name(collectives.rank())
            files = {role: write_chunks(job.writing / role / name, chunks) for role, chunks in job.chunks.items()}
        except Exception as error:  # of any kind: the other ranks wait for the result
            return _Report(error=str(error) or type(error).__name__)
        return _Report(files=files)

    def _commit(self, job: _Job, reports: Sequence[_Report]) -> str | None:
        """Writes what describes the ranks' files and removes older checkpoints; returns what went wrong."""
        try:
            files: dict[str, FileRecord] = {}
            for role, common in job.commons.items():
                written = [report.files[role] for report in reports]
                records = {file.name: file.record for file in written}
                chunks = [chunk for file in written for chunk in file.chunks]
                records |= write_description(job.writing / role, chunks, common)
                side = copy_side_files(Path(self.starts[role]), job.writing / role / SIDE_FOLDER)
                records |= {f"{SIDE_FOLDER}/{name}": record for name, record in side.items()}
                files |= {f"{role}/{name}": record for name, record in records.items()}
            files[TRAINER_STATE] = write_file(job.writing / TRAINER_STATE, job.trainer_state)
            manifest = Manifest(
                step=job.step, accuracy=job.accuracy, identity=self._identity, layout=self._sizes, files=files
            )
            commit(job.writing, manifest)
        except Exception as error:  # of any kind: the other ranks wait for the result
            return str(error) or type(error).__name__
        for old in superseded(self.folder, keep_last=self.section.keep_last, keep_best=self.section.keep_best or 0):
            try:
                remove(old)
            except OSError as error:
                logger.warning("%s: cannot be removed: %s", old, error)
        return None

    def _failure(self, writing: Path, problem: str) -> CheckpointError:
        kept = [path.name for path in committed(self.folder)]
        return CheckpointError(
            f"{writing.with_suffix('')}: cannot be written: {problem}; free space or choose another run.directory"
            f" (kept: {', '.join(kept) or 'none'})"
        )

    def _gathered(self, report: _Report) -> list[_Report]:
        """All ranks' reports, on the main process."""
        if self._group is None:
            return [report]
        reports: list[Any] = [None] * collectives.world_size()
        dist.gather_object(report, reports if collectives.is_main() else None, group=self._group)
        return reports

    def _broadcast(self, problem: str | None) -> str | None:
        if self._group is None:
            return problem
        box = [problem]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _copies(chunks: Sequence[StoredChunk]) -> Iterator[StoredChunk]:
    for chunk in chunks:
        own = torch.empty(chunk.tensor.shape, dtype=chunk.tensor.dtype, device="cpu")
        yield chunk._replace(tensor=own.copy_(chunk.tensor))


def _copies_of(role: TrainableRole, chunks: Sequence[StoredChunk]) -> Iterator[StoredChunk]:
    """Yields copies, each made when it is taken."""
    with awake(role):
        yield from _copies(chunks)


def _consumed(chunks: list[StoredChunk]) -> Iterator[StoredChunk]:
    """The chunks, whose memory is free when the next one is taken."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


_Place = tuple[str, tuple[int, ...]]


def _share_out(sizes: Mapping[_Place, int]) -> set[_Place]:
    """Selects the chunks that this rank writes among those that it holds; collective.

    Args:
        sizes: bytes of every chunk that this rank holds, by name and offsets.
    """
    names = {hashlib.blake2b(repr(place).encode(), digest_size=8).digest(): place for place in sizes}
    holders: dict[bytes, list[int]] = {}
    num_bytes: dict[bytes, int] = {}
    for rank, theirs in enumerate(collectives.all_gather({name: sizes[place] for name, place in names.items()})):
        num_bytes |= theirs
        for name in theirs:
            holders.setdefault(name, []).append(rank)
    loads = [0] * collectives.world_size()
    mine = set()
    for name in sorted(holders, key=lambda name: (-num_bytes[name], name)):
        writer = min(holders[name], key=lambda rank: loads[rank])
        loads[writer] += num_bytes[name]
        if writer == collectives.rank():
            mine.add(names[name])
    return mine
