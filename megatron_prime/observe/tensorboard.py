"""Metrics as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from megatron_prime.observe.loggers import LoggerRequest


class TensorBoardLogger:
    """Writes one event per metric and step (`interfaces.MetricsLogger`).

    Args:
        request: names the folder of the events.
    """

    def __init__(self, request: LoggerRequest) -> None:
        self._folder = request.folder
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            # A resumed run's first step hides what an earlier process wrote from there on.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
