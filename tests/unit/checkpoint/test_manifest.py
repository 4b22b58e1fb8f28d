"""Which checkpoints stay, and what a folder that is killed midway looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prime.checkpoint.manifest import (
    WRITING,
    Manifest,
    altered_files,
    commit,
    committed,
    problems_of,
    read_manifest,
    remove_leftovers,
    set_aside,
    step_folder,
    superseded,
    write_file,
)


def checkpoint(folder: Path, step: int, accuracy: float | None = None) -> Path:
    writing = step_folder(folder, step)
    writing = writing.with_name(writing.name + WRITING)
    (writing / "model").mkdir(parents=True)
    files = {"model/data": write_file(writing / "model" / "data", bytes(range(256)) * step)}
    return commit(writing, Manifest(step=step, accuracy=accuracy, identity={"a": 1}, layout={"tp": 2}, files=files))


def test_what_is_committed_reads_back(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3, 0.5)
    assert path.name == "step_00000003" and committed(tmp_path) == [path]
    manifest = read_manifest(path)
    assert (manifest.step, manifest.accuracy, manifest.identity, manifest.layout) == (3, 0.5, {"a": 1}, {"tp": 2})
    assert problems_of(path) == [] and altered_files(path, ["model/data"]) == []


@pytest.mark.parametrize(
    ("accuracies", "keep_last", "keep_best", "kept"),
    [
        ([None, None, None, None], 2, 1, [3, 4]),
        ([0.1, 0.9, 0.2, 0.3], 1, 0, [4]),
        ([0.1, 0.9, 0.2, 0.3], 1, 1, [2, 4]),
        ([0.9, 0.9, 0.2, 0.3], 1, 1, [2, 4]),  # of equals the later
        ([0.1, None, 0.2, 0.3], 2, 1, [3, 4]),
        ([0.5, 0.6, 0.2, None], 1, 2, [1, 2, 4]),
    ],
)
def test_the_latest_and_the_best_stay(tmp_path: Path, accuracies, keep_last: int, keep_best: int, kept) -> None:
    paths = [checkpoint(tmp_path, step, accuracy) for step, accuracy in enumerate(accuracies, start=1)]
    going = superseded(tmp_path, keep_last=keep_last, keep_best=keep_best)
    assert [n for n, path in enumerate(paths, start=1) if path not in going] == kept


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (second / "model" / "data").unlink()
    assert superseded(tmp_path, keep_last=1, keep_best=0) == []
    assert problems_of(second) == ["model/data is missing"] and problems_of(first) == []


def test_a_folder_of_another_step_and_an_unreadable_file_are_problems(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1).rename(tmp_path / "step_00000007")
    assert problems_of(path) == ["manifest.json is of step 1"]
    path = checkpoint(tmp_path, 2)
    (path / "model" / "data").unlink()
    assert altered_files(path, ["model/data"]) == ["model/data cannot be read: No such file or directory"]


def test_damage_is_set_aside_under_a_name_of_its_own_and_leftovers_go(tmp_path: Path) -> None:
    names = [set_aside(checkpoint(tmp_path, 1)).name for _ in range(2)]
    assert names == ["step_00000001.damaged", "step_00000001.damaged-2"]
    for name in ("step_00000002.writing", "step_00000003.removing"):
        (tmp_path / name).mkdir()
    assert [path.name for path in remove_leftovers(tmp_path)] == ["step_00000002.writing", "step_00000003.removing"]
    assert committed(tmp_path) == []
