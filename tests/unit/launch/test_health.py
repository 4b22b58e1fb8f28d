"""Which nodes are refused, and why."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_prime.launch import health


def node_problems(folder: Path, **changes: float) -> list[str]:
    limits = {"min_gpus": 0, "min_disk_gib": 0.001, "min_shm_mib": 1.0, "started": time.time()}
    return health.problems_of_node(folder=folder, **(limits | changes))  # type: ignore[arg-type]


def test_a_sound_node_has_no_problems(tmp_path: Path) -> None:
    assert node_problems(tmp_path / "new") == []
    assert list((tmp_path / "new").iterdir()) == []


def test_every_check_of_a_node_can_fail(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in node_problems(file / "below")[0]
    assert "GiB free of the" in node_problems(tmp_path, min_disk_gib=1e9)[0]
    assert "/dev/shm has" in node_problems(tmp_path, min_shm_mib=1e12)[0]
    assert "the clock is +900 s" in node_problems(tmp_path, started=time.time() - 900)[0]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, 0'\necho '1, 7'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert node_problems(tmp_path, min_gpus=2) == ["GPUs 1 have uncorrected memory errors; reset or replace them"]
    assert "2 of 4 GPUs answer" in node_problems(tmp_path, min_gpus=4)[0]


def test_the_check_prints_one_line_per_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["--folder", str(tmp_path), "--min-disk-gib", "0.001", "--min-shm-mib", "1"]) == 0
    assert capsys.readouterr().out.startswith("ok ")
    assert health.main(["--folder", str(tmp_path), "--min-disk-gib", "1e9", "--min-shm-mib", "1e12"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bad", "bad"]
