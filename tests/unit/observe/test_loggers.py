"""Metrics loggers: what they are made from, and that none of them ends a run."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_prime.config import load_config
from megatron_prime.errors import ConfigError
from megatron_prime.observe.loggers import GuardedLoggers, LoggerRequest, make_logger
from megatron_prime.observe.metrics import RunLog
from megatron_prime.observe.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
MODULE = """
made, raises_at = [], None

class Keeps:
    def __init__(self, request):
        self.request, self.calls = request, []
        if raises_at == "make":
            raise OSError("no server")
        made.append(self)
    def log(self, step, metrics):
        if raises_at == step:
            raise OSError("no server")
        self.calls.append((step, dict(metrics)))
    def close(self):
        self.calls.append("close")
        if raises_at == "close":
            raise OSError("no server")
"""


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    return folder


@pytest.fixture
def keeping(tmp_path, monkeypatch):
    """A module with a logger that keeps what it gets, or raises where it is told to."""
    (tmp_path / "keeping_logger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import keeping_logger

    yield keeping_logger
    del sys.modules["keeping_logger"]


def config_with(*loggers: str):
    return load_config(ROOT / "configs" / "arithmetic.yaml", [f"run.loggers=[{','.join(loggers)}]", "run.name=mine"])


def test_each_gets_a_folder_of_its_own_and_what_it_must_know_of_the_run(folder, keeping) -> None:
    config = config_with("tensorboard", "keeping_logger:Keeps")
    loggers = GuardedLoggers(config, folder, 7)
    loggers.log(8, {"policy/loss": 0.5})
    loggers.close()
    loggers.close()
    (kept,) = keeping.made
    assert kept.calls == [(8, {"policy/loss": 0.5}), "close"]
    request = kept.request
    assert request.folder == folder.logger_folder("keeping_logger:Keeps") and request.folder.is_dir()
    assert (request.run_name, request.num_steps, request.resume_step) == ("mine", config.run.num_steps, 7)
    assert not request.is_trial and request.config["prm"]["beta"] == config.prm.beta
    assert list(folder.tensorboard.glob("events.*"))


@pytest.mark.parametrize(
    ("raises_at", "said", "num_calls"),
    [("make", "cannot be made", 0), (2, "failed at step 2", 2), ("close", "failed to close", 4)],
)
def test_one_that_raises_is_reported_once_and_left_out(folder, keeping, caplog, raises_at, said, num_calls) -> None:
    keeping.raises_at = raises_at
    loggers = GuardedLoggers(config_with("keeping_logger:Keeps", "tensorboard"), folder, None)
    for step in (1, 2, 3):
        loggers.log(step, {"policy/loss": float(step)})
    loggers.close()
    (record,) = caplog.records
    message = record.getMessage()
    assert message == f"run.loggers: keeping_logger:Keeps {said} and is left out: OSError: no server"
    assert sum(len(kept.calls) for kept in keeping.made) == num_calls
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("policy/loss")] == [1, 2, 3]


def test_what_is_no_logger_is_named(folder) -> None:
    request = LoggerRequest(folder=folder.path, run_name="mine", num_steps=1, config={})
    with pytest.raises(ConfigError, match=r"run.loggers: what builtins:id returned has no log and no close"):
        make_logger("builtins:id", request)


def test_tensorboard_holds_the_scalars_and_a_resumed_run_replaces_later_ones(folder) -> None:
    def log(rows: dict[int, dict[str, float]], resume_step: int | None) -> None:
        loggers = GuardedLoggers(config_with("tensorboard"), folder, resume_step)
        run_log = RunLog(folder, 4, True, loggers=loggers, console=Console(file=io.StringIO()))
        for step, metrics in rows.items():
            run_log.log(step, metrics)
        run_log.close()

    log({step: {"policy/loss": float(step), "prm/loss": math.nan} for step in (1, 2, 3)}, None)
    # Files of one second are read in the order of their names, in which a process's tenth comes before its ninth.
    time.sleep(1.01 - time.time() % 1)
    log({2: {"policy/loss": 20.0}}, 1)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert events.Tags()["scalars"] == ["policy/loss"]
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [(1, 1.0), (2, 20.0)]
