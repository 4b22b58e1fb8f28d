"""A file of rows survives the end of its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prime.errors import DataError
from megatron_prime.observe.row_file import RowFile

ROWS = [{"text": "a\nb\u2028c", "n": 1}, {"text": "½ \ud800", "n": None}]


def test_rows_come_back(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "new" / "rows.jsonl")
    assert file.read() == []
    file.append(ROWS)
    file.append([{"n": 2}])
    assert RowFile(file.path).read() == [*ROWS, {"n": 2}]


def test_a_row_that_was_cut_off_is_forgotten_and_overwritten(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.append(ROWS)
    whole = file.path.read_bytes()
    for length in range(len(whole.splitlines()[0]) + 1, len(whole)):
        file.path.write_bytes(whole[:length])
        assert file.read() == ROWS[:1]
        file.append(ROWS[1:])
        assert file.path.read_bytes() == whole


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(DataError, match="line 2: damaged"):
        RowFile(tmp_path / "rows.jsonl").read()
