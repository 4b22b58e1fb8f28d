"""Writes docs/reference/metrics.md from the table of metrics in the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prime.observe.metric_names import GROUPS, STAGES, Metric

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reference" / "metrics.md"

INTRODUCTION = """# Metrics

Generated from `megatron_prime/observe/metric_names.py` by `make docs`; edit the table there.

Each step is one row of JSON in `runs/NAME/metrics.jsonl` and one point per metric in TensorBoard. Row 0 is the
evaluation before training. Values are the same on every rank unless the meaning says otherwise. NaN and Inf are
written as `null`. "Per token" means per response token, averaged over the mini-batch.

The healthy ranges are where to look first, not limits: they come from the runs in [benchmarks](benchmarks.md) and from
the definitions. [The tutorial](../tutorial/from-files-to-a-better-model.md#what-the-plots-should-look-like) shows how
they move together.
"""

TITLES = {
    "evaluation": "Evaluation",
    "rollout": "Rollouts",
    "verdict": "Verdicts",
    "filter": "Filter",
    "prm": "Process reward model",
    "advantage": "Advantages",
    "policy": "Policy",
    "sft": "Supervised runs",
    "time": "Time",
    "memory": "Memory",
}

NOTES = {
    "rollout": "Logged in every PRIME step that samples; the last four need a batch to train on.",
    "verdict": "Logged in every PRIME step that samples.",
    "filter": "Logged in every PRIME step.",
    "prm": "Logged in every PRIME step that trains.",
    "advantage": "Logged in every PRIME step that trains.",
    "policy": "Logged in every step that trains the policy: not in the first `prm.warmup_steps`.",
    "sft": "Logged every `sft.log_every_steps` steps; values are those of the last one.",
}

TABLE_HEAD = "| Metric | Unit | Meaning | Healthy | When |\n|---|---|---|---|---|"


def row_text(metric: Metric) -> str:
    """One row of a table."""
    cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.healthy, metric.only)
    return "| " + " | ".join(cells) + " |"


def group_text(group: str) -> str:
    """Heading, note and table of one group."""
    note = f"{NOTES[group]}\n\n" if group in NOTES else ""
    return f"## {TITLES[group]}\n\n{note}{TABLE_HEAD}\n" + "\n".join(map(row_text, GROUPS[group])) + "\n"


def document() -> str:
    """The whole page."""
    stages = f"`<stage>` is one of {', '.join(f'`{stage}`' for stage in STAGES)}.\n"
    return "\n".join([INTRODUCTION, *map(group_text, GROUPS), stages])


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or with ``--check`` says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    if parser.parse_args(arguments).check:
        current = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
        up_to_date = current == document()
        print(f"{DOCUMENT.name} is {'up to date' if up_to_date else 'out of date: run `make docs`'}")
        return 0 if up_to_date else 1
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(f"wrote {DOCUMENT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
