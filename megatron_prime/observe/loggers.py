"""Metrics loggers by name, and what no logger may do to a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime.config import AnyConfig, to_dict
from megatron_prime.errors import ConfigError
from megatron_prime.interfaces import MetricsLogger
from megatron_prime.observe.run_folder import RunFolder
from megatron_prime.sockets import resolve

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerRequest:
    """What a metrics logger is made from, on the main process only."""

    folder: Path
    """A folder of its own in the run folder; it exists. A run that goes on has the files of the run before in it."""
    run_name: str
    num_steps: int
    """Length of the run."""
    config: Mapping[str, Any]
    """The resolved configuration as nested plain mappings."""
    resume_step: int | None = None
    """Step of the checkpoint that the run goes on from: what was logged after it is logged again. None: a new run."""
    is_trial: bool = False
    """`megatron-prime check` tries the logger on two made-up steps in a folder that it then deletes; what reaches a
    server should not do so now."""


def make_logger(name: str, request: LoggerRequest) -> MetricsLogger:
    """Makes one entry of ``run.loggers``.

    Raises:
        ConfigError: the name cannot be resolved, or makes no logger. What it raises itself comes through.
    """
    logger = resolve("run.loggers", name)(request)
    missing = [method for method in ("log", "close") if not callable(getattr(logger, method, None))]
    if missing:
        raise ConfigError(f"run.loggers: what {name} returned has no {' and no '.join(missing)}")
    return logger


class GuardedLoggers:
    """Several loggers as one (`interfaces.MetricsLogger`); one that raises is reported once and left out.

    Args:
        config: whose ``run.loggers`` are made.
        run_folder: where each gets a folder of its own.
        resume_step: as in `LoggerRequest`.
    """

    def __init__(self, config: AnyConfig, run_folder: RunFolder, resume_step: int | None) -> None:
        self._loggers: dict[str, MetricsLogger] = {}
        for name in config.run.loggers:
            folder = run_folder.logger_folder(name)
            request = LoggerRequest(
                folder=folder,
                run_name=config.run.name,
                num_steps=config.run.num_steps,
                config=to_dict(config),
                resume_step=resume_step,
            )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._loggers[name] = make_logger(name, request)
            except Exception as error:
                _report(name, "cannot be made", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `interfaces.MetricsLogger.log`."""
        for name, logger in list(self._loggers.items()):
            try:
                logger.log(step, metrics)
            except Exception as error:
                _report(name, f"failed at step {step}", error)
                del self._loggers[name]
                with contextlib.suppress(Exception):
                    logger.close()

    def close(self) -> None:
        """Closes those that are left; may be called twice."""
        for name, logger in self._loggers.items():
            try:
                logger.close()
            except Exception as error:
                _report(name, "failed to close", error)
        self._loggers = {}


def _report(name: str, what: str, error: Exception) -> None:
    _log.error("run.loggers: %s %s and is left out: %s: %s", name, what, type(error).__name__, error, exc_info=error)
