"""Hugging Face folders to Megatron distributed checkpoints and back, one weight in memory at a time.

A Megatron checkpoint made here is self-contained: beside the weights it keeps the Hugging Face
``config.json`` and tokenizer in ``hf/``, from which the way back is built. What a conversion has written before it was
killed is kept in a folder ``TARGET.writing``, verified by checksums, and the same conversion continues from there.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prime.checkpoint.journal import Journal, fingerprint
from megatron_prime.checkpoint.manifest import FileRecord, altered_files, committed, read_manifest, write_file
from megatron_prime.checkpoint.torch_dist import StoredChunk
from megatron_prime.errors import CheckpointError, PrimeError
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.conversion_plan import (
    RELEASE_BYTES,
    WHOLE,
    Cut,
    hf_sizes,
    megatron_files,
    padded_vocab_size,
    pipeline_stages,
)
from megatron_prime.weights.families import Sharding, WeightSpec, weight_specs
from megatron_prime.weights.hf_folder import HfFolder, expected_shapes
from megatron_prime.weights.hf_writer import HfWriter
from megatron_prime.weights.megatron_folder import (
    ChunkPlace,
    MegatronFolder,
    MegatronWriter,
    shard_chunks,
    stored_key,
    stored_shape,
)
from megatron_prime.weights.sharding import local_shape, local_slice, merge

SIDE_FOLDER = "hf"
Progress = Callable[[int, int], None]
"""Told the bytes written so far and in all."""
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    cut: Cut = WHOLE,
    progress: Progress | None = None,
) -> None:
    """Writes a Hugging Face folder as a Megatron distributed checkpoint.

    Args:
        source: folder with config.json and safetensors weights.
        target: new or empty folder; it appears when it is complete. A conversion that was stopped continues.
        dtype: float32, bfloat16, or None for bfloat16 where all weights are stored so, else float32.
        cut: which layout reads it fastest.
        progress: called after each weight.

    Raises:
        WeightsError: the folder's weights are incomplete, misshapen or damaged, or the model cannot be cut so;
            nothing is written.
        CheckpointError: the target holds something, or cannot be written.
    """
    _refuse_existing(target)
    folder, architecture = HfFolder(source), read_architecture(source)
    folder.validate(architecture)
    stored = {folder.dtype(name) for name in expected_shapes(architecture)}
    dtype = dtype or kept_dtype(stored)
    stages = pipeline_stages(architecture, cut)
    meter = _Meter(sum(megatron_files(architecture, stages, cut, dtype).values()), progress)
    job = {"to": "megatron", "dtype": str(dtype), "cut": [cut.tp_size, cut.pp_size], "source": fingerprint([source])}
    with _resumable(target, job) as journal:
        writer = MegatronWriter(journal, dtype)
        for rank, (stage, tp_rank) in enumerate(itertools.product(stages, range(cut.tp_size))):
            pieces = _Pieces(architecture=architecture, cut=cut, tp_rank=tp_rank, dtype=dtype, meter=meter)
            writer.write_file(rank, pieces.read(stage, folder, writer.written(rank)))
        copy_side_files(source, journal.folder / SIDE_FOLDER)
        writer.finish()
        shutil.rmtree(target, ignore_errors=True)
        journal.folder.rename(target)


def _refuse_altered(source: Path) -> None:
    """Reads a model of a run's checkpoint, whose files' checksums are in the folder above."""
    checkpoint = source.parent
    if checkpoint not in committed(checkpoint.parent):
        return
    try:
        names = [name for name in read_manifest(checkpoint).files if name.startswith(f"{source.name}/")]
        problems = altered_files(checkpoint, names)
    except ValueError as error:
        problems = [str(error)]
    if problems:
        raise CheckpointError(f"{checkpoint}: damaged: {'; '.join(problems)}; take another checkpoint of the run")


def to_hf(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the weights of a Megatron distributed checkpoint as a Hugging Face folder.

    Args:
        source: made by `to_megatron`, or a model of a run's checkpoint (``.../step_00000010/policy``), of any layout.
        target: new folder; it appears when it is complete. A conversion that was stopped continues.
        like: Hugging Face folder whose config.json and tokenizer to use; None: the checkpoint's own.
        dtype: float32, bfloat16, or None for what the checkpoint holds.
        progress: called after each weight.

    Raises:
        CheckpointError: the source is no checkpoint, is damaged, or does not name its model, or names another; or the
            target holds something, or cannot be written.
    """
    _refuse_existing(target)
    _refuse_altered(source)
    folder = MegatronFolder(source)
    side = side_folder(source, like)
    architecture = read_architecture(side)
    specs = weight_specs(architecture)
    num_rows = folder.num_rows(specs[0])
    if num_rows < architecture.vocab_size:
        raise CheckpointError(
            f"{source}: holds {num_rows} rows of the embedding, {side}/config.json says {architecture.vocab_size};"
            " it is of another model"
        )
    folder.validate(specs, architecture)
    dtype = dtype or kept_dtype(folder.dtypes)
    sizes = hf_sizes(architecture, dtype)
    meter = _Meter(sum(sizes.values()), progress)
    job = {"to": "hf", "dtype": str(dtype), "source": fingerprint([source, side])}
    with (
        _resumable(target, job) as journal,
        HfWriter(target, side, architecture, dtype, overwrite=True, journal=journal) as writer,
    ):
        meter.add(sum(sizes[name] for name in writer.written))
        for name, tensor in hf_tensors(folder, architecture, but=writer.written):
            writer.add(name, tensor)
            meter.add(sizes[name])


@contextmanager
def as_hf_folder(path: str) -> Iterator[str]:
    """The folder itself, or the Megatron checkpoint converted for as long as it is needed."""
    if not (Path(path) / SIDE_FOLDER / "config.json").is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "hf"
        to_hf(Path(path), target)
        yield str(target)


@contextmanager
def _resumable(target: Path, job: dict[str, Any]) -> Iterator[Journal]:
    """A folder beside the target that what was finished stays in, whatever stops the conversion but bad input."""
    writing = target.with_name(target.name + ".writing")
    try:
        with closing(Journal(writing, job)) as journal:
            yield journal
    except PrimeError:
        shutil.rmtree(writing)
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error}; free space and run the same command, which continues, or remove"
            f" {target.name}.writing"
        ) from error


def hf_tensors(
    folder: MegatronFolder, architecture: ModelArchitecture, *, but: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a validated checkpoint, one after the other, as stored, some left out."""
    for spec in weight_specs(architecture):
        if not set(spec.hf_names) <= set(but):
            merged = merge(spec, architecture, [folder.fetch(spec)], folder.num_rows(spec))
            yield from ((name, tensor) for name, tensor in merged if name not in but)


def side_folder(source: Path, like: Path | None) -> Path:
    """The folder with config.json and tokenizer of a Megatron checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    side = like or source / SIDE_FOLDER
    if not (side / "config.json").exists():
        raise CheckpointError(f"{source}: does not say which model it is; pass --like with its Hugging Face folder")
    return side


def kept_dtype(stored: set[torch.dtype]) -> torch.dtype:
    """bfloat16 where everything is stored so, else float32."""
    return torch.bfloat16 if stored == {torch.bfloat16} else torch.float32


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress:
            self._progress(self._done, self._total)


def _refuse_existing(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose a new folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """Reads what one rank's file holds, piece by piece."""

    architecture: ModelArchitecture
    cut: Cut
    tp_rank: int
    dtype: torch.dtype
    meter: _Meter

    def read(self, stage: list[WeightSpec], folder: HfFolder, written: Collection[ChunkPlace]) -> Iterator[StoredChunk]:
        """The chunks of a stage's weights but those that are written."""
        cut, padded = self.cut, padded_vocab_size(self.architecture, self.cut)
        unreleased = 0
        for spec in stage:
            if spec.is_whole and self.tp_rank > 0:
                continue
            shape = local_shape(spec, self.architecture, tp_size=cut.tp_size, padded_vocab_size=padded)
            if self._places(spec, shape) <= set(written):
                self.meter.add(math.prod(shape) * self.dtype.itemsize)
                continue
            shard = local_slice(
                spec,
                self.architecture,
                folder.fetch,
                tp_rank=self.tp_rank,
                tp_size=cut.tp_size,
                padded_vocab_size=padded,
            )
            stored = stored_shape(spec, self.architecture, padded)
            for offsets, part in shard_chunks(spec, shard, tp_rank=self.tp_rank, tp_size=cut.tp_size):
                if (stored_key(spec), offsets) not in written:
                    # torch.save writes the whole memory that a view is of.
                    own = part.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
                    yield StoredChunk(stored_key(spec), stored, offsets, own)
                self.meter.add(part.numel() * self.dtype.itemsize)
            # A column slice touches every page of its tensor.
            num_touched = cut.tp_size if spec.sharding is Sharding.ROW and not spec.is_whole else 1
            unreleased += shard.numel() * shard.itemsize * num_touched
            del shard, part
            if unreleased >= RELEASE_BYTES:
                folder.release()
                unreleased = 0

    def _places(self, spec: WeightSpec, shape: tuple[int, ...]) -> set[ChunkPlace]:
        nothing = torch.empty(shape, device="meta")
        chunks = shard_chunks(spec, nothing, tp_rank=self.tp_rank, tp_size=self.cut.tp_size)
        return {(stored_key(spec), offsets) for offsets, _ in chunks}


def copy_side_files(source: Path, target: Path) -> dict[str, FileRecord]:
    """Copies config.json, tokenizer and licence into a folder; weights of any format and folders stay behind."""
    target.mkdir(exist_ok=True)
    copied = {}
    for file in sorted(source.iterdir()):
        described = file.suffix in _SIDE_SUFFIXES or file.name.startswith(("LICENSE", "NOTICE"))
        if file.is_file() and described and not file.name.endswith(".index.json"):
            copied[file.name] = write_file(target / file.name, file.read_bytes())
    return copied
