"""Rows and console lines of a run, and what its loggers get."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from megatron_prime.observe.metrics import RunLog
from megatron_prime.observe.report import read_metrics
from megatron_prime.observe.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    return folder


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_are_flushed_step_by_step_and_never_hold_nan(folder):
    logger = RunLog(folder, 3, True, console=plain_console())
    logger.log(1, {"policy/loss": 0.25, "prm/loss": math.nan, "policy/kl": -math.inf})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in folder.metrics_path.read_text().splitlines()]
    assert rows == [{"step": 1, "policy/loss": 0.25, "prm/loss": None, "policy/kl": None}]
    logger.close()
    logger.close()
    logger.log(2, {"policy/loss": 1.0})
    assert len(folder.metrics_path.read_text().splitlines()) == 1


def test_disabled_logger_writes_and_prints_nothing(folder):
    console = plain_console()
    logger = RunLog(folder, 3, False, console=console)
    logger.progress("rollout")
    logger.log(1, {"policy/loss": 0.25})
    logger.close()
    assert list(folder.path.iterdir()) == []
    assert output(console) == ""


def test_one_plain_line_per_step_with_the_chosen_numbers(folder):
    console = plain_console()
    logger = RunLog(folder, 12, True, console=console, line={"rollout/accuracy": "right", "prm/loss": "PRM"})
    logger.progress("rollout")
    logger.log(1, {"prm/loss": 0.69314, "rollout/accuracy": 0.5, "policy/loss": 1.0})
    logger.log(2, {"rollout/accuracy": 0.7512})
    logger.close()
    first, second = output(console).splitlines()
    assert first == "step  1/12  right 50.0%  PRM 0.693"
    assert re.fullmatch(r"step  2/12  right 75\.1%  \S+ s/step, \d+:\d\d left", second)


def test_evaluation_of_the_same_step_does_not_count_as_a_step(folder):
    console = plain_console()
    logger = RunLog(folder, 5, True, console=console)
    logger.log(1, {"rollout/accuracy": 0.5})
    logger.log(1, {"evaluation/accuracy": 0.6})
    logger.close()
    assert "s/step" not in output(console)
    assert read_metrics(folder.metrics_path) == {"rollout/accuracy": ([1], [0.5]), "evaluation/accuracy": ([1], [0.6])}


def test_terminal_shows_bar_stage_and_lines(folder):
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    logger = RunLog(folder, 4, True, console=console)
    logger.log(1, {"rollout/accuracy": 0.5})
    logger.log(2, {"rollout/accuracy": 0.75})
    logger.progress("policy update")
    logger.close()
    shown = output(console)
    assert "step 2/4  accuracy 75.0%" in shown
    assert "2/4" in shown and "policy update" in shown and "left" in shown


class Kept:
    """A metrics logger that keeps what it gets."""

    def __init__(self):
        self.rows, self.num_closed = [], 0

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self):
        self.num_closed += 1


def test_loggers_get_finite_metrics_and_are_closed_once(folder):
    loggers = Kept()
    logger = RunLog(folder, 4, True, loggers=loggers, console=plain_console())
    logger.log(0, {"evaluation/accuracy": 0.5})
    logger.log(1, {"policy/loss": 0.25, "prm/loss": math.nan, "policy/kl": math.inf})
    logger.close()
    logger.close()
    assert loggers.rows == [(0, {"evaluation/accuracy": 0.5}), (1, {"policy/loss": 0.25})]
    assert loggers.num_closed == 1
