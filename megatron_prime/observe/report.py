"""Reports of a run: plots of its metrics, the final table, summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prime.observe.atomic_files import write_atomically
from megatron_prime.observe.run_folder import RunFolder

Series = tuple[list[int], list[float]]


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads metrics.jsonl.

    Args:
        path: the file; a last line cut off by the end of its process is left out.

    Returns:
        Steps and values by metric, without missing values; where a step has several rows, the latest counts.
    """
    values: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        row: dict[str, Any] = json.loads(line)
        for key, value in row.items():
            if key != "step" and value is not None:
                values.setdefault(key, {})[row["step"]] = value
    return {key: (sorted(by_step), [by_step[s] for s in sorted(by_step)]) for key, by_step in values.items()}


def draw_plots(run_folder: RunFolder) -> list[Path]:
    """Draws every plot whose metrics the run has.

    Args:
        run_folder: a run with metrics.jsonl.

    Returns:
        The PNG files written to the run's plots folder.
    """
    # Half a second of imports that only the rank that draws should pay.
    from megatron_prime.observe.plots import draw_all

    run_folder.plots.mkdir(parents=True, exist_ok=True)
    return draw_all(read_metrics(run_folder.metrics_path), run_folder.plots)


def write_summary(run_folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Writes summary.json whole; values are what JSON knows."""
    write_atomically(run_folder.summary_path, json.dumps(dict(summary), indent=2, allow_nan=False) + "\n")


def final_table(summary: Mapping[str, Any], width: int = 100) -> str:
    """Formats the summary as a plain-text table.

    Args:
        summary: name -> value; ``[low, high]`` lists are intervals, shares are shown in percent where the
            name says accuracy.
        width: columns of the terminal.

    Returns:
        Lines ready to print.
    """
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), _value_text(key, value))
    return _plain_text(table, width)


def benchmark_table(results: Mapping[str, Any], width: int = 120) -> str:
    """Formats the result of an evaluation as a plain-text table.

    Args:
        results: what `evaluate` writes to results.json.
        width: columns of the terminal.

    Returns:
        Lines ready to print; shares are in percent, intervals hold 95%.
    """
    table = Table(title=f"{results['model']}", title_justify="left")
    several = any(len(row["scores"]) > 1 for row in results["benchmarks"].values())
    columns = ["benchmark", "problems", "answers", "average", "", *(["passed", ""] * several), "cut off", "no verdict"]
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "benchmark" else "right", no_wrap=True)
    for row in results["benchmarks"].values():
        (average, first), *others = row["scores"].items()
        passed = _score_cells(*others[-1]) if others else ("", "") * several
        problems = f"{row['num_problems']}" + (f" of {row['num_published']}" if row["num_published"] else "")
        cut_off = f"{100 * row['share_cut_off']:.1f}%"
        cells = (problems, f"{row['num_answers']}", *_score_cells(average, first), *passed, cut_off)
        table.add_row(row["title"], *cells, f"{row['num_missing']}")
    if results["average"] is not None:
        table.add_section()
        table.add_row("average", "", "", *_score_cells("", results["average"]))
    return _plain_text(table, width)


def cleaning_table(report: Mapping[str, Any], width: int = 100) -> str:
    """Formats what `prepare` kept and left out as a plain-text table.

    Args:
        report: what it writes to OUT.report.json.
        width: columns of the terminal.

    Returns:
        Lines ready to print.
    """
    table = Table(title=report["output"], title_justify="left")
    table.add_column("rows", min_width=17)
    table.add_column("", min_width=7, justify="right")
    table.add_column("the first of them", overflow="fold")
    table.add_row("read", f"{report['num_rows']}")
    for reason, count in report["dropped"].items():
        table.add_row(reason.replace("_", " "), f"{count}", report["examples"][reason][0])
    table.add_section()
    table.add_row("kept", f"{report['num_kept']}")
    for key in ("num_choices_opened", "num_references_passed"):
        table.add_row(f"  {key.removeprefix('num_').replace('_', ' ')}", f"{report[key]}")
    return _plain_text(table, width)


def _score_cells(name: str, score: Mapping[str, float]) -> tuple[str, str]:
    return f"{name} {100 * score['value']:.1f}%".strip(), f"{100 * score['low']:.1f}-{100 * score['high']:.1f}"


def _plain_text(table: Table, width: int) -> str:
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _value_text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " to ".join(_value_text(key, item) for item in value)
    if isinstance(value, float):
        return f"{100 * value:.1f}%" if "accuracy" in key else f"{value:.4g}"
    return str(value)
