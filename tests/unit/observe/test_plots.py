"""What is on the plots of a run: which are drawn, the values of their lines, and labels that can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.patches import StepPatch

from megatron_prime.observe import plots

STEPS = [1, 2, 3, 4]
METRICS: plots.Metrics = {
    "rollout/accuracy": (STEPS, [0.1, 0.2, 0.4, 0.5]),
    "evaluation/accuracy": ([0, 4], [0.15, 0.55]),
    "evaluation/accuracy_low": ([0, 4], [0.1, 0.5]),
    "evaluation/accuracy_high": ([0, 4], [0.2, 0.6]),
    "prm/fresh_auc": (STEPS, [0.5, 0.7, 0.8, 0.9]),
    "prm/gate": (STEPS, [0.0, 0.2, 0.5, 0.8]),
    "policy/loss": (STEPS, [0.3, 0.2, 0.1, 0.05]),
    "time/step_seconds": (STEPS, [4.0, 4.0, 5.0, 4.0]),
    "time/rollout_seconds": (STEPS, [1.0, 1.0, 2.0, 1.0]),
    "time/prm_update_seconds": ([2, 4], [0.5, 0.5]),
}


def only_axes(figure) -> Axes:
    (axes,) = figure.axes
    return axes


def lines_of(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_a_run_gets_the_plots_that_its_metrics_allow(tmp_path: Path) -> None:
    written = plots.draw_all(METRICS, tmp_path)
    assert [path.name for path in written] == ["accuracy.png", "prm.png", "training.png", "time.png"]
    assert all(imread(path).std() > 0 for path in written), "an empty picture"
    supervised = {"sft/loss": METRICS["policy/loss"]}
    assert [path.name for path in plots.draw_all(supervised, tmp_path)] == ["training.png"]
    assert plots.draw_all({}, tmp_path) == []


def test_accuracy_has_rollouts_and_held_out_problems_with_their_interval() -> None:
    axes = only_axes(plots._accuracy(METRICS))
    assert lines_of(axes) == [METRICS["rollout/accuracy"], METRICS["evaluation/accuracy"]]
    (band,) = axes.collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert {(0.0, 0.1), (0.0, 0.2), (4.0, 0.5), (4.0, 0.6)} <= corners
    assert {text.get_text() for text in axes.texts} >= {"rollouts (reward)"}


def test_trust_in_the_prm_is_drawn_beside_chance() -> None:
    axes = only_axes(plots._trust(METRICS))
    assert lines_of(axes)[:2] == [METRICS["prm/fresh_auc"], METRICS["prm/gate"]]
    assert list(axes.lines[-1].get_ydata()) == [0.5, 0.5]
    assert axes.get_ylim()[0] == 0.0
    better = only_axes(plots._trust({"prm/fresh_auc": METRICS["prm/fresh_auc"]}))
    assert better.get_ylim()[0] == pytest.approx(0.3)


def test_stages_of_a_step_are_stacked_up_to_its_whole_time() -> None:
    axes = only_axes(plots._time(METRICS))
    stages = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]
    # The longest first: what no stage accounts for, then rollouts.
    heights = [[top - low for top, low in zip(data.values, data.baseline, strict=True)] for data in stages]
    assert heights == [[3.0, 2.5, 3.0, 2.5], [1.0, 1.0, 2.0, 1.0], [0.0, 0.5, 0.0, 0.5]]
    assert list(stages[-1].values) == METRICS["time/step_seconds"][1]
    assert [text.get_text() for text in axes.texts] == ["other (2.8 s)", "rollout (1.2 s)", "PRM update (0.25 s)"]


def test_labels_of_lines_that_end_together_are_pushed_apart_inside_the_plot() -> None:
    _, axes = plots._single("title")
    axes.plot([0, 1], [0, 1])
    plots._finish(axes, [(0.98, "a", "k"), (0.99, "b\nof two lines", "k"), (1.0, "c", "k"), (0.2, "d", "k")])
    places = sorted((text.get_position()[1], text.get_text()) for text in axes.texts)
    assert [text for _, text in places] == ["d", "a", "b\nof two lines", "c"]
    heights = [plots._LABEL_GAP * (1 + text.count("\n")) for _, text in places]
    for (low, high), (below, above) in zip(pairwise([place for place, _ in places]), pairwise(heights), strict=True):
        assert high - low >= (below + above) / 2 - 1e-9
    assert places[-1][0] <= 1.0


def test_a_metric_of_one_step_is_a_point() -> None:
    _, axes = plots._single("title")
    plots._plot(axes, ([3], [0.5]), "k")
    plots._plot(axes, ([3, 4], [0.5, 0.6]), "k")
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]
