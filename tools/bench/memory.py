"""Peak memory of the stages of a PRIME step, with what saves memory switched on, on a model of Qwen2.5-0.5B's shape.

Each variant is a run of its own, one process, float32, on the CPU; the numbers are the run's own metrics
(`memory/<stage>_gib`: peak resident size), and what the formulas of `planner/footprint.py` say of models. `--layers`
cuts the model down for machines with less than 24 GiB. Prints a table and writes build/bench/memory.json.
"""

from __future__ import annotations

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
from common.measuring import ROOT, bench_parser, machine, write_result
from rich.console import Console
from rich.table import Table

NUM_STEPS = 2
STAGES = ("rollout", "score", "prm_update", "policy_update", "refit")
FREED, NO_COPY = "parallel.offload_idle=gradients", "reference.source=policy"
VARIANTS = {
    "as it was": [],
    "not packed": ["micro_batch.packed=false"],
    "gradient buffers freed": [FREED],
    "policy as reference": [NO_COPY],
    "ours": [FREED, NO_COPY],
}
"""`ours` is packed, as all but one are."""
COMMON = [
    f"run.num_steps={NUM_STEPS + 1}",
    "run.num_threads=2",
    "parallel.world_size=1",
    "parallel.tensor_model_parallel_size=1",
    "rollout.num_prompts=4",
    "rollout.max_response_tokens=64",
    "filter.min_accuracy=0",
    "filter.max_accuracy=1",
    "filter.max_attempts=1",
    "prm.num_window_batches=1",
    "advantage.process_gate=none",
    "policy.num_minibatches=1",
    "micro_batch.micro_batch_tokens=512",
    "evaluation.num_prompts=0",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=0",
    "checkpoint.export_hf=false",
]
TINY = ["run.num_threads=1", "rollout.num_prompts=1", "rollout.max_response_tokens=8", "data.num_problems=100"]


def run(scratch: Path, folder: Path, variant: str, overrides: list[str]) -> dict[str, Any]:
    """Peaks by stage after the first step, which allocates, and seconds of a step."""
    name = variant.replace(" ", "_")
    runs = scratch / "runs"
    shutil.rmtree(runs / name, ignore_errors=True)
    command = [sys.executable, "-m", "megatron_prime", "train", str(ROOT / "configs" / "arithmetic.yaml")]
    command += [f"run.directory={runs}", f"run.name={name}", f"model.path={folder}", *COMMON, *overrides]
    log = scratch / f"{name}.log"
    metrics = runs / name / "metrics.jsonl"
    with log.open("w") as output:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        # The last step would save a checkpoint of many GB.
        while process.poll() is None and num_lines(metrics) < NUM_STEPS:
            time.sleep(0.2)
    process.kill()
    process.wait()
    if num_lines(metrics) < NUM_STEPS:
        sys.exit(f"{variant} failed: see {log}")
    steps = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["step"] > 1]
    peaks = {stage: max(row[f"memory/{stage}_gib"] for row in steps) for stage in STAGES}
    seconds = statistics.median(row["time/step_seconds"] for row in steps)
    return {"variant": variant, "seconds": seconds, "peak_gib": max(peaks.values()), **peaks}


def num_lines(path: Path) -> int:
    """Of a file that may not be there yet."""
    return path.read_text().count("\n") if path.exists() else 0


def planned(folder: Path) -> dict[str, float]:
    """GiB of one trained model by part, from the formulas of the planner."""
    from megatron_prime.config import load_config
    from megatron_prime.planner.footprint import LayoutSizes, model_bytes
    from megatron_prime.weights.architecture import read_architecture

    config = load_config(ROOT / "configs" / "arithmetic.yaml", [f"model.path={folder}", *COMMON])
    found = model_bytes(read_architecture(folder), LayoutSizes.of(config, on_cpu=True), 0, trained=True)
    return {part: getattr(found, part) / 2**30 for part in ("weights", "gradients", "optimizer")}


def main() -> None:
    """Measures every variant and reports."""
    parser = bench_parser(__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of the model (default: 24, as Qwen2.5-0.5B has)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    scratch = (options.output / "memory").resolve()
    config = TINY_CONFIG if options.tiny else CONFIG | {"num_hidden_layers": options.layers}
    where = machine(f"{config['num_hidden_layers']} layers")
    folder = make_trainable(scratch / f"{config['num_hidden_layers']}_layers_of_{config['hidden_size']}", config)
    variants, tiny = (["ours"], TINY) if options.tiny else (options.variants, [])
    rows = [run(scratch, folder, variant, [*VARIANTS[variant], *tiny]) for variant in variants]
    parts = planned(folder)
    write_result("memory", where, rows, options, planned_gib=parts)
    table = Table(title=f"Peak resident GiB by stage, {where}")
    for column in ("variant", *STAGES, "whole step", "s/step"):
        table.add_column(column)
    for row in rows:
        peaks = [f"{row[stage]:.2f}" for stage in STAGES]
        table.add_row(row["variant"], *peaks, f"{row['peak_gib']:.2f}", f"{row['seconds']:.1f}")
    console = Console(width=120)
    console.print(table)
    console.print("one trained model, planned: " + ", ".join(f"{part} {gib:.2f} GiB" for part, gib in parts.items()))


if __name__ == "__main__":
    main()
