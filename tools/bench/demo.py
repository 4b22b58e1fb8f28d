"""PRIME beside outcome-only RLOO on the arithmetic task, several seeds from one supervised start.

Runs the shipped configurations through the command line, prints a table and writes build/bench/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.measuring import ROOT, bench_parser, machine, write_result
from rich.console import Console
from rich.table import Table

# Longer than the demo, to see what comes after it; learning rates are constant, so the first steps are the demo's.
NUM_STEPS = 40
DEMO_STEPS = 28
VARIANTS = {"ours": [], "outcome_only_rloo": ["advantage.process_coef=0"]}
TINY = ["parallel.world_size=1", "data.num_problems=100", "checkpoint.every_steps=0", "run.plots=false"]
TINY_SFT = [*TINY, "run.num_steps=5", "sft.optimizer.lr_warmup_steps=0", "sft.log_every_steps=1"]
TINY_PRIME = [
    *TINY,
    "run.num_steps=2",
    "parallel.tensor_model_parallel_size=1",
    "rollout.num_prompts=4",
    "rollout.max_response_tokens=16",
    "filter.enabled=false",
    "evaluation.num_prompts=8",
    "evaluation.every_steps=1",
]


def run(command: str, config: str, *overrides: str) -> None:
    """One command of megatron-prime, its output on this terminal."""
    arguments = [
        sys.executable,
        "-m",
        "megatron_prime",
        command,
        str(ROOT / "configs" / config),
        *overrides,
    ]
    subprocess.run(arguments, check=True, cwd=ROOT)


def measure(variant: str, seed: int, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """One PRIME run; its summary, and the AUC of process rewards from step 10 on."""
    name = f"{variant}_{seed}"
    summary_path = runs / name / "summary.json"
    if not summary_path.exists():
        where = [f"run.directory={runs}", f"run.name={name}", f"run.seed={seed}", f"model.path={runs / 'sft' / 'hf'}"]
        run("train", "arithmetic.yaml", *where, "checkpoint.export_hf=false", *VARIANTS[variant], *overrides)
    summary = json.loads(summary_path.read_text())
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    aucs = [row["prm/step_auc_recent"] for row in steps if row["step"] >= 10 and "prm/step_auc_recent" in row]
    singles = [row["prm/step_auc"] for row in steps if 10 <= row["step"] <= DEMO_STEPS and "prm/step_auc" in row]
    seconds = [row["time/step_seconds"] for row in steps]
    return {
        "variant": variant,
        "seed": seed,
        "seconds": summary["wall_seconds"],
        "step_seconds": sum(seconds) / len(seconds),
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "accuracy_after_interval": summary["accuracy_after_interval"],
        "accuracy_by_step": {
            row["step"]: row["evaluation/accuracy"] for row in rows if row.get("evaluation/accuracy") is not None
        },
        "step_auc_from_step_10": {"mean": sum(aucs) / len(aucs), "lowest": min(aucs)} if aucs else None,
        "lowest_single_step_auc_of_demo": min(singles) if singles else None,
    }


def main() -> None:
    """Measures every variant and seed that has no result yet, then reports all."""
    parser = bench_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    runs = (options.output / "demo_runs").resolve()
    if not (runs / "sft" / "hf").exists():
        sft = TINY_SFT if options.tiny else []
        run("sft", "arithmetic_sft.yaml", f"run.directory={runs}", "run.name=sft", *sft)
    seeds, prime = (options.seeds[:1], TINY_PRIME) if options.tiny else (options.seeds, [f"run.num_steps={NUM_STEPS}"])
    rows = [measure(variant, seed, runs, prime) for seed in seeds for variant in VARIANTS]
    write_result("demo", machine(), rows, options)

    table = Table(title="Arithmetic: PRIME (ours) beside outcome-only RLOO")
    for column in ("variant", "seed", "before", "after (95%)", "step AUC >= 10", "s/step", "seconds"):
        table.add_column(column)
    for row in rows:
        low, high = row["accuracy_after_interval"]
        auc = row["step_auc_from_step_10"]
        table.add_row(
            row["variant"],
            str(row["seed"]),
            f"{row['accuracy_before']:.1%}",
            f"{row['accuracy_after']:.1%} ({low:.1%} to {high:.1%})",
            f"{auc['mean']:.2f}, lowest {auc['lowest']:.2f}" if auc else "-",
            f"{row['step_seconds']:.2f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
