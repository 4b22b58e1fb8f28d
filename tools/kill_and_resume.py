"""Kills a PRIME run again and again, inside saves too, and compares what comes out with a run that nobody touched.

Two ranks of the arithmetic task with small sizes, a checkpoint after every step. The chain is restarted after each
SIGKILL of its whole process group; every second kill waits until a checkpoint is being written. At the end the metrics
of every step and the bytes of the final policy and PRM must be equal to those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMMAND = (sys.executable, "-m", "megatron_prime")
_PATIENCE_SECONDS = 300
_SAVE_SECONDS = 0.03
"""A save of this size takes about so long."""


@dataclass(frozen=True, slots=True)
class Kill:
    """What was there when a run was killed."""

    after_step: int
    """The last one in the metrics; -1 before the first row."""
    writing: bool
    """A checkpoint was half written."""
    newest: int
    """Step of the newest complete checkpoint, 0 without one."""


def read_curve(run: Path) -> list[dict[str, float | None]]:
    """The metrics log of a run without what depends on the clock and on the process's past."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


def last_step(run: Path) -> int:
    """Of the metrics; -1 without any."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def is_writing(run: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    return any((run / "checkpoints").glob("*.writing"))


def kill_once(arguments: Sequence[str], run: Path, *, num_steps: int, in_save: bool, delay: float) -> Kill:
    """Starts the run and kills all its processes.

    Args:
        arguments: of the command line.
        run: its folder.
        num_steps: steps of this life that must be logged first.
        in_save: then wait for the beginning of a save.
        delay: then wait this long, in seconds.

    Raises:
        RuntimeError: the run ended by itself, or nothing happened for minutes.
    """
    before = last_step(run)
    with (run.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen([*COMMAND, *arguments], stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while last_step(run) < before + num_steps or (in_save and not is_writing(run)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run ended ({process.poll()}) or hung before it was killed; see {log.name}")
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The ranks die with the launcher, a moment later.
    time.sleep(0.2)
    complete = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*") if path.suffix == ""]
    return Kill(last_step(run), is_writing(run), max(complete, default=0))


def arguments_of(start: Path, folder: Path, name: str, num_steps: int) -> list[str]:
    """The command line of a small run of two ranks."""
    overrides = {
        "run.directory": folder,
        "run.name": name,
        "run.num_steps": num_steps,
        "model.path": start,
        "rollout.num_prompts": 8,
        "rollout.max_response_tokens": 32,
        # More groups than a batch takes, so that the filter's buffer has to survive too.
        "filter.max_attempts": 3,
        "filter.min_accuracy": 0.1,
        "filter.max_accuracy": 0.9,
        "evaluation.every_steps": 5,
        "evaluation.num_prompts": 20,
        "checkpoint.every_steps": 1,
    }
    return ["train", str(CONFIGS / "arithmetic.yaml"), *(f"{key}={value}" for key, value in overrides.items())]


def make_start(folder: Path) -> Path:
    """A starting model that gets some answers right."""
    overrides = [f"run.directory={folder}", "run.name=sft", "run.num_steps=300", "sft.optimizer.lr=4e-3"]
    command = [*COMMAND, "sft", str(CONFIGS / "arithmetic_sft.yaml"), *overrides, "checkpoint.every_steps=0"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "sft" / "hf"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status says whether everything was equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="more than the kills let pass")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("build/kill_and_resume"))
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    start = make_start(options.folder)
    whole, broken = (arguments_of(start, options.folder, name, options.steps) for name in ("whole", "broken"))
    subprocess.run([*COMMAND, *whole], check=True, capture_output=True)
    moments = random.Random(options.seed)
    kills: list[Kill] = []
    for number in range(options.kills):
        in_save = number % 2 == 1
        delay = moments.uniform(0, _SAVE_SECONDS if in_save else 1.0)
        num_steps = moments.randint(0 if number % 5 == 4 else 1, 2)
        kills.append(kill_once(broken, options.folder / "broken", num_steps=num_steps, in_save=in_save, delay=delay))
        print(f"kill {number + 1:2}: {kills[-1]}", flush=True)
    subprocess.run([*COMMAND, *broken], check=True, capture_output=True)
    same_curve = read_curve(options.folder / "whole") == read_curve(options.folder / "broken")
    files = [f"{name}/model.safetensors" for name in ("hf", "hf_prm")]
    pairs = [[(options.folder / run / file).read_bytes() for run in ("whole", "broken")] for file in files]
    same_weights = all(one == other for one, other in pairs)
    in_saves = sum(kill.writing for kill in kills)
    print(f"{len(kills)} kills, {in_saves} of them with a half-written checkpoint; {options.steps} steps")
    print(f"metrics of every step equal: {same_curve}; final policy and PRM equal byte by byte: {same_weights}")
    return 0 if same_curve and same_weights else 1


if __name__ == "__main__":
    sys.exit(main())
