"""The outer loop of every run: restore, step, evaluate, log, save, stop."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from megatron_prime.config.schema import CheckpointSection
from megatron_prime.errors import RunInterrupted
from megatron_prime.interfaces import Checkpoints, Logger
from megatron_prime.trainer.stages import Stages

logger = logging.getLogger(__name__)


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens every `every` steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


class Loop(ABC):
    """Runs steps to the last one, or until asked to stop; a resumed run continues as if nothing had happened.

    Args:
        num_steps: of the whole run.
        section: says when to save.
        checkpoints: saves and restores the state.
        metrics: receives metrics.
        should_stop: asked after every step, by all ranks together; true on one is true on all.
        enter: called with the phase and the step whenever a stage starts or ends.
        log_every_steps: steps between rows of the metrics log; the last step always has one.
    """

    def __init__(
        self,
        num_steps: int,
        section: CheckpointSection,
        checkpoints: Checkpoints,
        metrics: Logger,
        *,
        should_stop: Callable[[], bool] = bool,
        enter: Callable[[str, int], None] = lambda phase, step: None,
        log_every_steps: int = 1,
    ) -> None:
        self.stages = Stages(metrics.progress, enter)
        self.num_steps_done = 0
        self._num_steps = num_steps
        self._save_every_steps = section.every_steps
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._should_stop = should_stop
        self._log_every_steps = log_every_steps
        self._started = time.perf_counter()

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Does one step and returns its metrics."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Returns the contents of summary.json, without the launcher's part (commit, machine)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the loop's own state; the checkpointer adds models and optimizers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    @abstractmethod
    def begin(self, *, is_resumed: bool) -> None:
        """Prepares the first step of this process."""

    def evaluate(self, *, is_last: bool) -> dict[str, float]:
        """Returns the metrics of an evaluation after a step, if one is due."""
        return {}

    def before_save(self) -> float | None:
        """Frees memory for a save; returns the accuracy that ranks the checkpoint, if known."""
        return None

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, earlier processes included."""
        return time.perf_counter() - self._started

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary of the run.

        Raises:
            RunInterrupted: asked to stop; everything is saved.
        """
        with self.stages("restore"):
            state = self._checkpoints.restore()
        if state is not None:
            self.load_state_dict(state)
            self.num_steps_done = state["num_steps_done"]
            self._started -= state["seconds"]
            logger.info("resumed after step %d", self.num_steps_done)
        self.begin(is_resumed=state is not None)
        self.stages.drain()
        while self.num_steps_done < self._num_steps:
            self.stages.step = self.num_steps_done + 1
            metrics = self.step()
            self.num_steps_done += 1
            is_last = self.num_steps_done == self._num_steps
            metrics |= self.evaluate(is_last=is_last)
            if is_last or is_due(self.num_steps_done, self._log_every_steps):
                self._metrics.log(self.num_steps_done, metrics | self.stages.drain())
            self._checkpoints.check()
            self._save_or_stop(is_last)
        return self.summary()

    def _save_or_stop(self, is_last: bool) -> None:
        stopping = not is_last and self._should_stop()
        saving = is_last or stopping or is_due(self.num_steps_done, self._save_every_steps)
        if saving:
            self._save(background=not (is_last or stopping))
        # A stop request that arrived during the save must not cost another step.
        stopping = stopping or (saving and not is_last and self._should_stop())
        if is_last or stopping:
            with self.stages("checkpoint"):
                self._checkpoints.finish()
        if stopping:
            raise RunInterrupted(f"stopped as asked and saved after step {self.num_steps_done}")

    def _save(self, *, background: bool) -> None:
        """Saves everything, or starts to: in the background, training continues meanwhile."""
        accuracy = self.before_save()
        with self.stages("checkpoint"):
            state = {"num_steps_done": self.num_steps_done, "seconds": self.seconds, **self.state_dict()}
            self._checkpoints.save(self.num_steps_done, state, accuracy=accuracy, background=background)
