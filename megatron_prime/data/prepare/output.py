"""Cleaned rows on disk: the whole file or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_prime.data.prepare.candidates import Candidate
from megatron_prime.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
_GROUP_ROWS = 4096


def check_output(path: Path) -> None:
    """Refuses a file that exists, or that cannot be written in a format known here."""
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; choose a name that ends in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise DataError(f"{path}: exists already; choose another name or delete it")


def write_rows(path: Path, candidates: Iterable[Candidate], split: str) -> None:
    """Writes rows in the schema of Eurus-2-RL-Data as they come.

    Args:
        path: new file; until all rows are in it, it is called ``.NAME.part``.
        candidates: what to write.
        split: name for ``extra_info``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    rows = (candidate.row(split, index) for index, candidate in enumerate(candidates))
    try:
        if path.suffix == ".parquet":
            _write_parquet(part, rows)
        else:
            with part.open("w", encoding="utf-8", errors="surrogatepass") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64()}),
        }
    )
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema))
