"""What a stopped conversion has on disk already, so that the same command goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_prime.checkpoint.manifest import FileRecord, record_of

_FILE = "journal.jsonl"

Part = dict[str, Any]
"""A finished piece of a file: `file`, `start`, `length`, `crc32`, and what its writer wants to know again."""


class Journal:
    """A folder of files that are being written, and one line per finished part of them.

    Opening reads every part back: one whose bytes are not those that were written is forgotten, and so is everything
    where another job was begun.

    Args:
        folder: made if it is not there.
        job: what decides the bytes, as JSON.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self.folder = folder
        found = self._read()
        if found[:1] != [job]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            found = [job]
        self.parts = [part for part in found[1:] if self._is_whole(part)]
        written = folder / f"{_FILE}.new"
        written.write_text("".join(f"{json.dumps(line)}\n" for line in [job, *self.parts]), encoding="utf-8")
        written.replace(folder / _FILE)
        self._lines = (folder / _FILE).open("a", encoding="utf-8")

    def parts_of(self, file: str) -> list[Part]:
        """The parts of one file in the order in which they were finished."""
        return [part for part in self.parts if part["file"] == file]

    def note(self, part: Part) -> None:
        """Remembers a part whose bytes are in its file."""
        self._lines.write(json.dumps(part) + "\n")
        self._lines.flush()

    def finish(self) -> None:
        """Ends the journal of a whole conversion."""
        self.close()
        for name in {part["file"] for part in self.parts}:
            # Whoever wrote it may have been stopped before the disk had it.
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        (self.folder / _FILE).unlink()

    def close(self) -> None:
        """Leaves everything as it is."""
        self._lines.close()

    def _read(self) -> list[Any]:
        try:
            lines = (self.folder / _FILE).read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line may be cut off.
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except (OSError, ValueError):
            return []

    def _is_whole(self, part: Part) -> bool:
        try:
            record = record_of(self.folder / part["file"], part["start"], part["length"])
            return record == FileRecord(part["length"], part["crc32"])
        except (OSError, KeyError):
            return False


def fingerprint(folders: Iterable[Path]) -> list[list[Any]]:
    """Names, sizes and times of the files of folders: other ones are another source."""
    files = sorted(entry.path for folder in folders for entry in os.scandir(folder) if entry.is_file())
    return [[str(Path(file).resolve()), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
