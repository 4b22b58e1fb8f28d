"""A metrics logger of your own: one CSV file per run, which a resumed run continues.

    PYTHONPATH=examples megatron-prime train CONFIG 'run.loggers=[tensorboard, own_logger:make]'

Only the main process has loggers. One that raises is reported and left out; training goes on without it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping

from megatron_prime import LoggerRequest


class CsvLogger:
    """Writes step, metric and value in three columns."""

    def __init__(self, request: LoggerRequest) -> None:
        path = request.folder / "metrics.csv"
        rows = []
        if request.resume_step is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                # Steps after the checkpoint are made, and logged, once more.
                rows = [row for row in csv.reader(file) if row and int(row[0]) <= request.resume_step]
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerows(rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step; the training loop waits for it."""
        self._writer.writerows((step, name, value) for name, value in metrics.items())
        self._file.flush()

    def close(self) -> None:
        """Called once, at the end of the run or when it stops."""
        self._file.close()


def make(request: LoggerRequest) -> CsvLogger:
    """Called once, on the main process; `request.folder` is this logger's own."""
    return CsvLogger(request)
