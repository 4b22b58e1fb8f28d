"""Checkpoints that are whole or not there: every file's size and CRC-32 in a manifest, written last, and a rename.

A checkpoint is written to ``step_00000010.writing`` and renamed when all its files and the manifest are on disk. Only
standard Python here: launchers ask too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
WRITING = ".writing"
REMOVING = ".removing"
DAMAGED = ".damaged"
FORMAT = 2
_STEP = re.compile(r"step_(\d{8,})")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    num_bytes: int
    crc32: int
    """Finds every change of up to 32 neighbouring bits, and any other but for one in four billion; no protection
    against an adversary. It runs at several times the speed of a cryptographic digest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Steps done."""
    accuracy: float | None
    """Of the evaluation after this step, if there was one."""
    identity: Mapping[str, Any]
    """What the models are; a run goes on only from its own."""
    layout: Mapping[str, int]
    """Sizes that wrote it, for the reader's information; it loads at any."""
    files: Mapping[str, FileRecord]
    """By path relative to the folder."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def committed(folder: Path) -> list[Path]:
    """Checkpoints that were once complete, oldest first; damage since then is for `problems_of` to find."""
    return sorted(path for path in folder.glob("step_*") if _STEP.fullmatch(path.name) and not path.is_file())


def record_of(path: Path, start: int = 0, length: int | None = None) -> FileRecord:
    """Reads a file, or as much of it as there is of `length` bytes from `start` on."""
    num_bytes = crc = 0
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK_BYTES if length is None else min(_BLOCK_BYTES, length - num_bytes)):
            num_bytes, crc = num_bytes + len(block), zlib.crc32(block, crc)
    return FileRecord(num_bytes, crc)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder safe on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> FileRecord:
    """Writes a small file, safe on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(content), zlib.crc32(content))


def commit(writing: Path, manifest: Manifest) -> Path:
    """Makes a written folder a checkpoint; all its files must be on disk.

    Args:
        writing: named ``step_..`` with the suffix `WRITING`.
        manifest: of all files.

    Returns:
        The checkpoint.
    """
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "accuracy": manifest.accuracy,
        "identity": manifest.identity,
        "layout": manifest.layout,
        "files": {name: [file.num_bytes, file.crc32] for name, file in sorted(manifest.files.items())},
    }
    text = json.dumps(content | {"crc32": _self_check(content)}, indent=1)
    write_file(writing / MANIFEST, text.encode())
    for inner in (*(path for path in writing.rglob("*") if path.is_dir()), writing):
        sync_folder(inner)
    final = writing.with_suffix("")
    if final.exists():
        remove(final)
    writing.rename(final)
    sync_folder(final.parent)
    return final


def remove(path: Path) -> None:
    """Removes a checkpoint; killed midway, it leaves nothing that looks like one."""
    going = path.with_name(path.name + REMOVING)
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that nothing takes it for one, and returns its new place."""
    number = 1
    while (target := path.with_name(path.name + DAMAGED + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    path.rename(target)
    return target


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what a killed run was writing or removing, and returns it."""
    leftovers = sorted(path for suffix in (WRITING, REMOVING) for path in folder.glob(f"step_*{suffix}"))
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, half written or altered.
    """
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is half written or altered") from error
    if not isinstance(content, dict) or content.pop("crc32", None) != _self_check(content):
        raise ValueError(f"{MANIFEST} is altered")
    if content["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {content['format']}, this version reads {FORMAT}")
    if content["step"] != step_of(path):
        raise ValueError(f"{MANIFEST} is of step {content['step']}")
    return Manifest(
        step=content["step"],
        accuracy=content["accuracy"],
        identity=content["identity"],
        layout=content["layout"],
        files={name: FileRecord(*values) for name, values in content["files"].items()},
    )


def problems_of(path: Path) -> list[str]:
    """What is wrong with a checkpoint, as far as it shows without reading its files; empty where nothing is."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    problems = []
    for name, expected in manifest.files.items():
        file = path / name
        if file.is_symlink() and not file.exists():
            problems.append(f"{name} is a link to a file that is gone")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif (size := file.stat().st_size) != expected.num_bytes:
            problems.append(f"{name} has {size} bytes instead of {expected.num_bytes}")
    return problems


def altered_files(path: Path, names: Sequence[str]) -> list[str]:
    """Reads files of a checkpoint and says which are not what the manifest says."""
    expected = read_manifest(path).files
    problems = []
    for name in names:
        try:
            if record_of(path / name) != expected[name]:
                problems.append(f"{name} is altered")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def foreign_files(path: Path) -> list[str]:
    """Files in a checkpoint's folder that its manifest does not know."""
    known = {MANIFEST, *read_manifest(path).files}
    found = (str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())
    return sorted(name for name in found if name not in known)


def superseded(folder: Path, *, keep_last: int, keep_best: int) -> list[Path]:
    """Checkpoints that are neither among the latest nor among the best.

    Args:
        folder: of the checkpoints.
        keep_last: how many of the latest stay.
        keep_best: how many of those with the highest accuracy stay; of equals the later.
    """
    found = [(path, read_manifest(path)) for path in committed(folder) if not problems_of(path)]
    rated = [(manifest.accuracy, manifest.step, path) for path, manifest in found if manifest.accuracy is not None]
    best = {path for _, _, path in sorted(rated, reverse=True)[:keep_best]}
    return [path for path, _ in found[:-keep_last] if path not in best]


def _self_check(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
