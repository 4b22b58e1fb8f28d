"""Status files can be read at any time, whatever their ranks do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_prime.watch.rank_status import RankStatus, StatusFile, rank_list, read_statuses


def test_files_are_json_of_one_size(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, 3)
    status = RankStatus(rank=3, host="h", pid=1, phase="rollout", step=2, phase_seconds=5.0, num_checks=1)
    for failure in ("x" * 5000, None):
        file.write(replace(status, failure=failure))
        (found,) = read_statuses(tmp_path).values()
        assert (found.failure or "") == (failure or "")[:200]
        assert 5.0 <= found.phase_seconds < 6.0 and found.place() == "phase rollout of step 2"
    assert (tmp_path / "rank_00003.json").stat().st_size == 1024
    file.close()


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, 3)
    file.write(RankStatus(rank=3, host="h", pid=1, phase="start", step=0, phase_seconds=0.0, num_checks=1))
    file.close()
    (tmp_path / "rank_00004.json").write_text("{half")
    assert list(read_statuses(tmp_path)) == [3]


def test_ranks_in_a_row_are_one_span() -> None:
    assert rank_list([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert rank_list([7]) == "rank 7"
