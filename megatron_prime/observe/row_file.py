"""Append-only file of rows: what was appended before the process died is still there afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_prime.errors import DataError


class RowFile:
    """JSONL that is only ever appended to.

    Args:
        path: created with its folder on the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; a last one that a killed process has not finished is cut off the file.

        Raises:
            DataError: a row before the last is damaged.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rpartition(b"\n")[0]
        if whole:
            whole += b"\n"
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        rows = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{self.path}, line {number}: damaged ({error}); delete the file") from error
        return rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows and waits until they are on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="surrogatepass") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
