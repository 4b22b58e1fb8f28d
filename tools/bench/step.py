"""Time and memory of whole PRIME steps, here and at an earlier commit: the demo, and a model of Qwen2.5-0.5B's shape.

Each run is a process of its own, commits in turn, `--repeats` times; the median step of the fastest run counts. Memory
is the sum of the ranks' peak resident sizes. The 0.5B-shaped model has random weights, so its answers are all
wrong: it shows cost, not learning. It trains on outcomes only: with Adam's states, a PRM of that size beside the policy
would not fit 24 GiB. Prints a table and writes build/bench/step.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.half_billion import CONFIG, TINY_CONFIG, make_trainable
from common.measuring import ROOT, bench_parser, machine, peak_bytes, write_result
from rich.console import Console
from rich.table import Table

PHASES = ("score", "prm_update", "policy_update", "step")
# Everything is kept, because random weights solve nothing.
LARGE = [
    "run.num_threads=2",
    "parallel.world_size=1",
    "parallel.tensor_model_parallel_size=1",
    "rollout.num_prompts=2",
    "rollout.max_response_tokens=64",
    "filter.min_accuracy=0",
    "filter.max_accuracy=1",
    "filter.max_attempts=1",
    "prm.num_window_batches=1",
    "advantage.process_coef=0",
    "policy.num_minibatches=1",
    "evaluation.num_prompts=0",
    "micro_batch.micro_batch_tokens=2048",
]
TINY = ["run.num_threads=1", "rollout.max_response_tokens=8", "data.num_problems=100"]
COMMON = ["evaluation.every_steps=0", "checkpoint.every_steps=0", "checkpoint.export_hf=false"]


def peak_mib(processes: list[int]) -> dict[int, float]:
    """Peak resident size of each process that still runs."""
    found = {}
    for process in processes:
        with contextlib.suppress(OSError):
            found[process] = peak_bytes(process) / 2**20
    return found


def children(process: int) -> list[int]:
    """A process and everything below it."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            for child in task.read_text().split():
                found += children(int(child))
        except OSError:
            continue
    return found


def run(code: Path, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Trains a few steps with the package in `code`; seconds of the median step by phase, and peak memory."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "megatron_prime", "train", str(ROOT / "configs" / "arithmetic.yaml")]
    command += [f"run.directory={folder.parent}", f"run.name={folder.name}", *COMMON, *overrides]
    environment = os.environ | {"PYTHONPATH": str(code)}
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    peaks: dict[int, float] = {}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=code, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for member, peak in peak_mib(children(process.pid)).items():
                peaks[member] = max(peak, peaks.get(member, 0.0))
            time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{folder.name} failed: see {log}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # The first step also probes, plans and allocates.
    steps = [row for row in rows if row["step"] > 1]
    result = {phase: statistics.median(row.get(f"time/{phase}_seconds", 0.0) for row in steps) for phase in PHASES}
    # Verifier workers and the launcher are small; the ranks hold the models.
    return result | {"peak_mib": sum(sorted(peaks.values())[-ranks(overrides) :])}


def ranks(overrides: list[str]) -> int:
    return 1 if "parallel.world_size=1" in overrides else 2


def small_model(runs: Path) -> Path:
    """The demo's starting model, shortly trained: its steps cost the same."""
    folder = runs / "sft" / "hf"
    if not folder.exists():
        config = str(ROOT / "configs" / "arithmetic_sft.yaml")
        command = [sys.executable, "-m", "megatron_prime", "sft", config, f"run.directory={runs}", "run.name=sft"]
        subprocess.run([*command, "run.num_steps=1300"], check=True, cwd=ROOT)
    return folder


def overrides_of(case: str, scratch: Path) -> list[str]:
    """The run of a case: its model, which is made where there is none yet, and how long it is."""
    if case == "demo":
        return [f"model.path={small_model(scratch / 'runs')}", "run.num_steps=12"]
    if case == "tiny":
        model = make_trainable(scratch / "tiny", TINY_CONFIG)
        return [f"model.path={model}", "run.num_steps=2", *LARGE, *TINY]
    model = make_trainable(scratch / "qwen2.5_0.5b_shape", CONFIG)
    return [f"model.path={model}", "run.num_steps=2", *LARGE]


def main() -> None:
    """Measures both commits on both models and reports."""
    parser = bench_parser(__doc__)
    parser.add_argument("--baseline", help="commit to compare with")
    parser.add_argument("--cases", nargs="+", choices=["demo", "0.5B"], default=["demo", "0.5B"])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    scratch = (options.output / "step").resolve()
    code = {"ours": ROOT}
    if options.baseline:
        tree = scratch / "baseline"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", options.baseline], check=True, cwd=ROOT, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(tree)], check=True, input=archive.stdout)
        code = {"before": tree, **code}
    rows: list[dict[str, Any]] = []
    cases, repeats = (["tiny"], 1) if options.tiny else (options.cases, options.repeats)
    for case in cases:
        overrides = overrides_of(case, scratch)
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in code}
        for _ in range(repeats):
            for variant, package in code.items():
                found[variant].append(run(package, scratch / "runs" / f"{case}_{variant}", overrides))
        for variant, results in found.items():
            best = min(results, key=lambda result: result["step"])
            peak = min(result["peak_mib"] for result in results)
            rows.append({"variant": variant, "case": case, "seconds": best["step"], **best, "peak_mib": peak})
    report(rows, machine())
    write_result("step", machine(), rows, options)


def report(rows: list[dict[str, Any]], machine: str) -> None:
    """Prints the table."""
    table = Table(title=f"Seconds of a PRIME step, {machine}")
    for column in ("model", "variant", *PHASES, "peak MiB, all ranks"):
        table.add_column(column)
    for row in rows:
        seconds = [f"{row[phase]:.2f}" for phase in PHASES]
        table.add_row(row["case"], row["variant"], *seconds, f"{row['peak_mib']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
