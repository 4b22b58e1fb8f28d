"""A rank that dies, is stopped or is stuck ends the job, and the first that is said names it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import prime_config, small_model_folder, write_yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.watch.exit_status import FAILED, STALLED

COMMAND = [sys.executable, "-m", "megatron_prime"]
PATIENCE_SECONDS = 120
FAULTY_VERIFIER = """
import os, time, zlib
from megatron_prime import heartbeat

def raises(section):
    if os.environ.get("RANK") == "1":
        raise ZeroDivisionError("what nobody foresaw")
    return Verifier(lambda: None)

def makes_progress(section):
    def wait():
        # For longer than anyone would wait for a rank that does nothing.
        for _ in range(40 if os.environ.get("RANK") == "1" else 0):
            time.sleep(0.5)
            heartbeat.beat()
    return Verifier(wait, times=1)

def sleeps(section):
    return Verifier(lambda: time.sleep(1000) if os.environ.get("RANK") == "1" else None)

class Verifier:
    def __init__(self, act, times=10**9):
        self.act, self.times, self.count = act, times, 0
    def submit(self, prompt, response):
        self.count += 1
        if self.count <= self.times:
            self.act()
        from megatron_prime.batch import Verdict
        from megatron_prime.verify.futures import known
        return known(Verdict(status="correct", reward=float(zlib.crc32(repr(response.text).encode()) % 2)))
    def close(self):
        pass
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are noise, with the arithmetic tokenizer."""
    folder = small_model_folder(tmp_path_factory.mktemp("models") / "random")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def endless_sft(directory: Path, timeout_seconds: float) -> Path:
    config: dict[str, Any] = {
        "kind": "sft",
        "run": {"name": "endless", "directory": str(directory), "num_steps": 10**6},
        "model": {"path": str(small_model_folder(directory / "shape")), "init": "random"},
        "parallel": {"world_size": 2, "timeout_seconds": timeout_seconds},
        "data": {"kind": "arithmetic"},
        "sft": {"batch_size": 2, "log_every_steps": 1, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"every_steps": 0},
    }
    return write_yaml(directory / "endless.yaml", config)


def signal_second_rank(config: Path, number: signal.Signals) -> tuple[int, list[str]]:
    """Starts a run, signals rank 1 once it trains, and returns status and standard error of the launcher."""
    command = [*COMMAND, "sft", str(config)]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = config.parent / "endless" / "metrics.jsonl", time.monotonic() + PATIENCE_SECONDS
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert launcher.poll() is None
            time.sleep(0.05)
        ranks = children_of(launcher.pid)
        os.kill(ranks[1], number)
        _, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        return launcher.returncode, [line for line in errors.splitlines() if not line.startswith("INFO")]
    finally:
        launcher.kill()
        launcher.wait()


def test_a_killed_rank_is_named_and_nobody_else_speaks(tmp_path: Path) -> None:
    status, lines = signal_second_rank(endless_sft(tmp_path, 1000), signal.SIGKILL)
    assert status == 128 + signal.SIGKILL
    (line,) = lines
    assert line.startswith("rank 1 was killed by SIGKILL (often by the kernel, for want of memory) in phase ")
    assert " of step " in line


def test_a_stopped_rank_is_named_with_its_stack(tmp_path: Path) -> None:
    status, lines = signal_second_rank(endless_sft(tmp_path, 3), signal.SIGSTOP)
    assert status == STALLED
    assert lines[0].startswith(f"rank 1 on host {os.uname().nodename} has been in phase ")
    assert lines[0].endswith(" s (stopped by a signal, as SIGSTOP does); rank 0 waits for it")
    assert 'sft.py", line' in "".join(lines) and lines[-1].endswith("in _run_module_as_main")
    assert (tmp_path / "endless" / "ranks" / "stall_report.txt").read_text().splitlines() == lines


def run_with_faulty_verifier(
    directory: Path, model: Path, function: str, timeout_seconds: float = 3
) -> tuple[int, list[str]]:
    (directory / "faulty_verifier.py").write_text(FAULTY_VERIFIER)
    config = prime_config(
        str(model),
        str(directory),
        "faulty",
        parallel={"world_size": 2, "timeout_seconds": timeout_seconds},
        verifier={"factory": f"faulty_verifier:{function}"},
        evaluation={"num_prompts": 0},
        rollout={"num_prompts": 4, "max_response_tokens": 4},
    )
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [*COMMAND, "train", str(write_yaml(directory / "faulty.yaml", config))],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return result.returncode, [line for line in result.stderr.splitlines() if not line.startswith("INFO")]


def test_an_unforeseen_error_is_the_first_and_only_traceback(tmp_path: Path, random_model: Path) -> None:
    status, lines = run_with_faulty_verifier(tmp_path, random_model, "raises")
    assert status == FAILED
    assert lines[0] == "rank 1 failed in phase start:"
    assert lines[-1] == "ZeroDivisionError: what nobody foresaw"
    assert sum(line.startswith("Traceback") for line in lines) == 1


def test_a_rank_that_is_stuck_in_python_is_named(tmp_path: Path, random_model: Path) -> None:
    status, lines = run_with_faulty_verifier(tmp_path, random_model, "sleeps")
    assert status == STALLED, lines
    assert lines[0].startswith("rank 1 on host ") and " in phase rollout of step 1 for " in lines[0]
    assert lines[0].endswith("waits in no collective); rank 0 waits for it")
    assert re.search(r'faulty_verifier.py", line \d+ in <lambda>', "".join(lines[1:3]))


def test_a_rank_whose_engine_or_verifier_makes_progress_is_waited_for(tmp_path: Path, random_model: Path) -> None:
    status, lines = run_with_faulty_verifier(tmp_path, random_model, "makes_progress", timeout_seconds=12)
    assert (status, lines) == (0, [])
    rows = [json.loads(line) for line in (tmp_path / "faulty" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("time/rollout_seconds", 0.0) for row in rows) > 18
