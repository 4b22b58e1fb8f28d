"""The PNG plots of a run; a plot whose metrics are absent is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Series = tuple[list[int], list[float]]
Metrics = Mapping[str, Series]

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#882E72", "#777777"
STAGE_COLORS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"),
    *("#999933", "#332288", "#999999", "#882255", "#000000", "#AA7744"),
)
"""By a stage's share of the time; more than a run has stages."""
_LABEL_GAP = 0.055
"""Least distance of two labels at the right edge, as a share of the plot's height."""


class Line(NamedTuple):
    """One metric as it is drawn."""

    key: str
    label: str
    color: str
    style: str = "-"


TRUST = (
    Line("prm/fresh_accuracy", "outcome accuracy", ORANGE),
    Line("prm/fresh_auc", "outcome AUC", BLUE),
    Line("prm/step_auc_recent", "step AUC, last 8 steps", GREEN),
    Line("prm/gate", "gate", GREY, "--"),
)

PANELS = {
    "sft/loss": "SFT loss",
    "policy/loss": "Policy loss",
    "prm/loss": "PRM loss",
    "policy/entropy": "Policy entropy (nats)",
    "policy/kl": "KL from the rollout policy (nats)",
    "policy/clip_fraction": "Share of clipped tokens",
    "policy/grad_norm": "Policy gradient norm",
    "prm/grad_norm": "PRM gradient norm",
    "advantage/process_share": "Process rewards' share of the advantage",
    "rollout/response_tokens": "Tokens per response",
    "rollout/truncated": "Share of truncated responses",
    "filter/kept": "Share of groups kept by the filter",
}


def draw_all(metrics: Metrics, folder: Path) -> list[Path]:
    """Draws the plots that the metrics allow.

    Args:
        metrics: steps and values by metric.
        folder: where the PNG files go.

    Returns:
        The files written.
    """
    plots: dict[str, Callable[[Metrics], Figure | None]] = {
        "accuracy": _accuracy,
        "prm": _trust,
        "training": _training,
        "time": _time,
    }
    written = []
    for name, draw in plots.items():
        figure = draw(metrics)
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def _accuracy(metrics: Metrics) -> Figure | None:
    """Held-out accuracy with its 95% interval, and the accuracy (= mean reward) of the rollouts."""
    if "evaluation/accuracy" not in metrics and "rollout/accuracy" not in metrics:
        return None
    figure, axes = _single("Accuracy")
    ends = []
    if "rollout/accuracy" in metrics:
        _plot(axes, metrics["rollout/accuracy"], ORANGE, linewidth=1.2)
        ends.append((metrics["rollout/accuracy"][1][-1], "rollouts (reward)", ORANGE))
    if "evaluation/accuracy" in metrics:
        steps, values = metrics["evaluation/accuracy"]
        label = "held-out problems"
        if "evaluation/accuracy_low" in metrics and "evaluation/accuracy_high" in metrics:
            low, high = metrics["evaluation/accuracy_low"], metrics["evaluation/accuracy_high"]
            axes.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.15, linewidth=0)
            label += "\n(band: 95% interval)"
        axes.plot(steps, values, color=BLUE, linewidth=2.2, marker="o", markersize=5)
        ends.append((values[-1], label, BLUE))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    _finish(axes, ends)
    return figure


def _trust(metrics: Metrics) -> Figure | None:
    """Draws how well the PRM judges rollouts that it has not trained on."""
    lines = [line for line in TRUST if line.key in metrics]
    if not lines:
        return None
    figure, axes = _single("PRM on fresh rollouts, before it trains on them")
    for line in lines:
        _plot(axes, metrics[line.key], line.color, line.style, linewidth=1.8)
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    low = min(min(metrics[line.key][1]) for line in lines)
    axes.set_ylim(min(0.0 if low < 0.3 else 0.3, low), 1.02)
    axes.text(0.99, 0.51, "chance", transform=axes.get_yaxis_transform(), color=GREY, fontsize=9, ha="right")
    _finish(axes, [(metrics[line.key][1][-1], line.label, line.color) for line in lines])
    return figure


def _training(metrics: Metrics) -> Figure | None:
    """Small multiples: losses, entropy, KL, gradient norms, rollout statistics."""
    keys = [key for key in PANELS if key in metrics]
    if not keys:
        return None
    num_columns = min(3 if len(keys) <= 9 else 4, len(keys))
    num_rows = -(-len(keys) // num_columns)
    figure = Figure(figsize=(4.0 * num_columns, 2.6 * num_rows), layout="constrained")
    for place, key in enumerate(keys, start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        _plot(axes, metrics[key], BLUE)
        axes.set_title(PANELS[key], loc="left", fontsize=10)
        _plain(axes)
        if place > len(keys) - num_columns:
            axes.set_xlabel("step", fontsize=9)
    return figure


def _time(metrics: Metrics) -> Figure | None:
    """Seconds of a step by stage, stacked; what no stage accounts for is `other`."""
    total = metrics.get("time/step_seconds")
    stages = {
        key.removeprefix("time/").removesuffix("_seconds").replace("_", " ").replace("prm", "PRM"): dict(
            zip(*series, strict=True)
        )
        for key, series in metrics.items()
        if key.startswith("time/") and key.endswith("_seconds") and key != "time/step_seconds"
    }
    if not stages:
        return None
    steps = total[0] if total is not None else sorted({step for series in stages.values() for step in series})
    stacked = {name: [series.get(step, 0.0) for step in steps] for name, series in stages.items()}
    if total is not None:
        named = [sum(column) for column in zip(*stacked.values(), strict=True)]
        stacked["other"] = [max(whole - part, 0.0) for whole, part in zip(total[1], named, strict=True)]
    stacked = dict(sorted(((name, s) for name, s in stacked.items() if any(s)), key=lambda item: -sum(item[1])))
    if not stacked:
        return None
    colors = {name: STAGE_COLORS[i % len(STAGE_COLORS)] for i, name in enumerate(stacked)}
    figure, axes = _single("Seconds per step, by stage")
    # One filled outline per stage: thousands of separate bars would take seconds to draw.
    edges = [step - 0.5 for step in steps] + [steps[-1] + 0.5]
    bottom, ends = [0.0] * len(steps), []
    for name, seconds in stacked.items():
        top = [low + height for low, height in zip(bottom, seconds, strict=True)]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colors[name])
        ends.append(((bottom[-1] + top[-1]) / 2, f"{name} ({sum(seconds) / len(seconds):.2g} s)", colors[name]))
        bottom = top
    _finish(axes, ends)
    return figure


def _single(title: str) -> tuple[Figure, Axes]:
    """A figure of one plot with room for labels at the right."""
    figure = Figure(figsize=(8.6, 4.6))
    axes = figure.add_axes((0.08, 0.12, 0.68, 0.76))
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=12)
    axes.set_xlabel("step")
    return figure, axes


def _plot(axes: Axes, series: Series, color: str, style: str = "-", linewidth: float = 1.4) -> None:
    steps, values = series
    # A line through one point is invisible.
    axes.plot(steps, values, style, color=color, linewidth=linewidth, marker="o" if len(steps) == 1 else None)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=9)


def _finish(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels lines at their last value (value, text, color), pushed apart where they would overlap."""
    _plain(axes)
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    wanted = sorted(((value - low) / (high - low), text, color) for value, text, color in ends)
    heights = [_LABEL_GAP * (1 + text.count("\n")) for _, text, _ in wanted]
    places: list[float] = []
    for i, (place, _, _) in enumerate(wanted):
        lowest = places[-1] + (heights[i - 1] + heights[i]) / 2 if places else 0.0
        places.append(max(place, lowest))
    # Whatever was pushed over the top edge is pushed back down, highest first.
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - (heights[i - 1] + heights[i]) / 2
    for place, (_, text, color) in zip(places, wanted, strict=True):
        axes.text(1.02, place, text, transform=axes.transAxes, color=color, va="center", fontsize=10)
