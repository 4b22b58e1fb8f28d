"""Files that are whole or absent: written beside their place, then moved there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_prime.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content; a reader or a killed process never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def require_folder(path: Path) -> None:
    """Makes a folder if there is none, and tries whether files can be made in it.

    Raises:
        DataError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise DataError(f"{path}: no files can be written there ({error.strerror}); choose another place") from error
