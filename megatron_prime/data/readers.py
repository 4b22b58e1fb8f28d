"""Rows from JSONL, JSON and Parquet files and from Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prime.data.row_formats import Row
from megatron_prime.errors import DataError


def read_rows(source: str) -> Iterator[tuple[str, Row]]:
    """Reads a data source row by row.

    Args:
        source: a `.jsonl`, `.jsonl.gz`, `.json` (list of rows, dict of pandas columns, or one row per line) or
            `.parquet` file, or `hf:NAME[:CONFIG]:SPLIT`, where NAME may be a folder written by
            `datasets.save_to_disk`.

    Yields:
        (`source`, row number) as text for messages and ids, and the row.

    Raises:
        DataError: the source is missing, damaged or of an unknown kind.
    """
    if source.startswith("hf:"):
        rows = _read_hugging_face(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"{source}: no such file; check data.train and data.evaluation")
        readers = {".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        kind = next((kind for kind in readers if path.name.endswith(kind)), None)
        if kind is None:
            raise DataError(f"{source}: unknown kind of file; expected {', '.join(readers)} or hf:NAME[:CONFIG]:SPLIT")
        rows = readers[kind](path)
    for number, row in enumerate(rows):
        if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
            # A row that is a list of turns (ORZ).
            row = {"conversation": row}
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: expected an object with columns, found {type(row).__name__}")
        yield f"{source}, row {number}", row


def _read_jsonl(path: Path) -> Iterator[Any]:
    num_lines = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                num_lines += 1
                if line.strip():
                    yield json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {num_lines}: not JSON: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error


def _read_json(path: Path) -> Iterator[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{path}: not JSON: {error}") from error
        yield from _read_jsonl(path)
        return
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if isinstance(content, list):
        yield from content
    elif isinstance(content, dict) and content and all(isinstance(column, dict) for column in content.values()):
        for key in next(iter(content.values())):
            yield {name: column.get(key) for name, column in content.items()}
    else:
        raise DataError(f"{path}: expected a list of rows or a dict of columns (pandas.DataFrame.to_json)")


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error


def _read_hugging_face(source: str) -> Iterator[Any]:
    parts = source.split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{source}: expected hf:NAME[:CONFIG]:SPLIT")
    name, split = parts[0], parts[-1]
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: needs the package 'datasets'; pip install datasets") from error
    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, parts[1] if len(parts) == 3 else None, split=split)
    except Exception as error:  # Hub, HTTP and file-system libraries each raise their own; all mean the same here.
        raise DataError(f"{source}: cannot be loaded: {error}") from error
    yield from data
