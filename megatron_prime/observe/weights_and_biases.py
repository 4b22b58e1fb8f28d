"""Metrics in Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import wandb

from megatron_prime.observe.loggers import LoggerRequest


class WandbLogger:
    """Logs to one run of Weights & Biases, also over resumes (`interfaces.MetricsLogger`).

    Server, project, entity, key and offline mode are read from wandb's own environment variables (`WANDB_PROJECT`,
    `WANDB_MODE`, ...). Metrics are drawn over ``step``: rows that a resumed run logs again are drawn a second time.

    Args:
        request: names run and folder; the configuration becomes the run's.
    """

    def __init__(self, request: LoggerRequest) -> None:
        # Its own file, because a run's name may be used again in another run folder.
        id_file = request.folder / "run_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            name=request.run_name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=request.folder,
            config=dict(request.config),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()
