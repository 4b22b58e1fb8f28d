"""Metrics read back, plots, table and summary."""

import json
import math
import re
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

import megatron_prime
from megatron_prime.observe.plots import STAGE_COLORS
from megatron_prime.observe.report import draw_plots, final_table, read_metrics, write_summary
from megatron_prime.observe.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    return folder


def write_rows(folder: RunFolder, rows: list[dict]) -> None:
    folder.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metrics_are_read_by_key_without_gaps_or_half_rows(folder):
    write_rows(
        folder,
        [{"step": 2, "a": 1.0, "b": None}, {"step": 1, "a": 0.5}, {"step": 2, "a": 3.0}, {"step": 3, "b": 7.0}],
    )
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 4, "a": 1')
    assert read_metrics(folder.metrics_path) == {"a": ([1, 2], [0.5, 3.0]), "b": ([3], [7.0])}


def test_plots_of_a_whole_run_are_pictures_with_something_on_them(folder):
    rows: list[dict] = [{"step": 0, "evaluation/accuracy": 0.5, "evaluation/accuracy_low": 0.4}]
    rows[0]["evaluation/accuracy_high"] = 0.6
    for step in range(1, 21):
        row = {
            "step": step,
            "rollout/accuracy": 0.5 + step / 50,
            "prm/fresh_auc": 0.9,
            "prm/step_auc_recent": 0.1,
            "prm/gate": 1,
        }
        row |= {"prm/fresh_accuracy": 0.8, "prm/loss": 1 / step, "policy/loss": math.sin(step), "filter/kept": 0.5}
        row |= {"time/rollout_seconds": 2.0, "time/score_seconds": 1.0, "time/step_seconds": 3.5}
        rows.append(row)
    write_rows(folder, rows)
    paths = draw_plots(folder)
    assert [path.name for path in paths] == ["accuracy.png", "prm.png", "training.png", "time.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 500
            colors = image.convert("RGB").getcolors(maxcolors=2**24)
        assert colors is not None and len(colors) > 20


def test_every_stage_has_its_own_color():
    trainer = Path(megatron_prime.__file__).parent / "trainer"
    found = [re.findall(r"\b_?stages?\(\s*\"([a-z_]+)\"", path.read_text()) for path in trainer.glob("*.py")]
    stages = set(chain.from_iterable(found))
    assert {"rollout", "score", "checkpoint"} <= stages
    # One more is what no stage accounts for.
    assert len(stages) < len(STAGE_COLORS) == len(set(STAGE_COLORS))


def test_absent_metrics_mean_absent_plots(folder):
    write_rows(folder, [{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": 1.0}])
    assert [path.name for path in draw_plots(folder)] == ["training.png"]
    write_rows(folder, [])
    assert draw_plots(folder) == []


def test_one_step_is_enough_for_every_plot(folder):
    write_rows(
        folder,
        [{"step": 1, "rollout/accuracy": 0.5, "prm/step_auc_recent": 0.5, "prm/loss": 1.0, "time/x_seconds": 0.0}],
    )
    assert [path.name for path in draw_plots(folder)] == ["accuracy.png", "prm.png", "training.png"]


def test_summary_is_valid_json_or_nothing(folder):
    write_summary(folder, {"accuracy_after": 0.9, "commit": None})
    assert json.loads(folder.summary_path.read_text()) == {"accuracy_after": 0.9, "commit": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(folder, {"accuracy_after": math.nan})
    assert json.loads(folder.summary_path.read_text())["accuracy_after"] == 0.9
    assert [path.name for path in folder.path.iterdir()] == ["summary.json"]


def test_final_table_shows_shares_intervals_and_numbers():
    table = final_table(
        {"accuracy_after": 0.9, "accuracy_after_interval": [0.86, 0.94], "num_steps": 40, "commit": None}
    )
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "│ accuracy after │ 90.0% │" in lines
    assert "│ accuracy after interval │ 86.0% to 94.0% │" in lines
    assert "│ num steps │ 40 │" in lines
    assert "│ commit │ - │" in lines
    assert "\x1b" not in table
