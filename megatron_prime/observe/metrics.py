"""Writes a run's metrics: one row of JSON per step, a line on the console, and the chosen loggers."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_prime.interfaces import MetricsLogger
from megatron_prime.observe.run_folder import RunFolder

LINE: Mapping[str, str] = {
    "sft/loss": "loss",
    "rollout/accuracy": "accuracy",
    "filter/kept": "kept",
    "prm/fresh_auc": "PRM AUC",
    "prm/step_auc": "step AUC",
    "prm/gate": "gate",
    "policy/kl": "KL",
    "evaluation/accuracy": "evaluation",
}
"""Metrics on a step's console line, in this order: key and displayed name."""

_NUM_TIMED_STEPS = 20


class RunLog:
    """Writes metrics and shows progress; on every process but the main one it does nothing.

    Args:
        run_folder: where metrics.jsonl goes.
        num_steps: length of the run.
        enabled: true on the main process.
        loggers: get the same metrics, without those that are not finite; closed with this log.
        line: which metrics the console shows, by key, with their names there.
        console: where the line goes; standard output by default.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        num_steps: int,
        enabled: bool,
        *,
        loggers: MetricsLogger | None = None,
        line: Mapping[str, str] = LINE,
        console: Console | None = None,
    ) -> None:
        self._run_folder = run_folder
        self._num_steps = num_steps
        self._enabled = enabled
        self._loggers = loggers
        self._line = line
        self._console = console or Console()
        self._step: int | None = None
        # This process's own steps only: a resumed run must not count earlier steps into its speed.
        self._times: deque[tuple[int, float]] = deque(maxlen=_NUM_TIMED_STEPS + 1)
        self._file: IO[str] | None = None
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=num_steps, rate="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step.

        Args:
            step: number of the step; 0 is before training.
            metrics: values by ``room/name``; NaN and infinity become ``null``.
        """
        if not self._enabled:
            return
        self._write(step, {key: _finite(value) for key, value in metrics.items()})
        if not self._times or step > self._times[-1][0]:
            self._times.append((step, time.monotonic()))
        self._step = step
        self._console.print(self._step_line(step, metrics), highlight=False, markup=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=self._rate())

    def progress(self, stage: str) -> None:
        """Shows what the run is doing now; on a terminal only."""
        if self._bar is not None:
            self._bar.update(self._task, description=stage)

    def close(self) -> None:
        """Flushes the files and ends the progress bar; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None
        if self._file is not None:
            self._file.close()
            self._file = None
        self._enabled = False

    def _write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if self._file is None:
            self._file = self._run_folder.metrics_path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._loggers is not None:
            self._loggers.log(step, {key: value for key, value in metrics.items() if value is not None})

    def _step_line(self, step: int, metrics: Mapping[str, float]) -> str:
        width = len(str(self._num_steps))
        numbers = [f"{name} {_short(key, metrics[key])}" for key, name in self._line.items() if key in metrics]
        return "  ".join([f"step {step:>{width}}/{self._num_steps}", *numbers, *filter(None, [self._rate()])])

    def _rate(self) -> str:
        """Seconds per step over the latest steps and the time that the rest will take."""
        if len(self._times) < 2:
            return ""
        (first, start), (last, now) = self._times[0], self._times[-1]
        seconds = (now - start) / (last - first)
        return f"{seconds:.3g} s/step, {_duration(seconds * max(self._num_steps - last, 0))} left"


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _short(key: str, value: float) -> str:
    shares = ("accuracy", "kept", "truncated")
    return f"{100 * value:.1f}%" if key.endswith(shares) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
