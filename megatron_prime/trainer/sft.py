"""Supervised fine-tuning: makes the model that PRIME starts from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import SftConfig
from megatron_prime.errors import NonFiniteError, RunInterrupted
from megatron_prime.interfaces import Checkpoints, Imitator, Logger, SftSource
from megatron_prime.trainer.settings import is_due
from megatron_prime.trainer.stages import Stages

logger = logging.getLogger(__name__)


class SftTrainer:
    """Trains one supervised run.

    Args:
        config: the checked configuration.
        model: the model to train.
        examples: prompts with answers.
        checkpoints: where the state goes.
        metrics: where the metrics go.
        should_stop: asked after every step, by all ranks together; true on one is true on all.
        enter: called with where the run is, and the step, whenever a stage starts or ends.
    """

    def __init__(
        self,
        config: SftConfig,
        model: Imitator,
        examples: SftSource,
        checkpoints: Checkpoints,
        metrics: Logger,
        should_stop: Callable[[], bool] = bool,
        enter: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.config = config
        self.model = model
        self.examples = examples
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.should_stop = should_stop
        self.stages = Stages(metrics.progress, enter)

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary of the run."""
        config = self.config
        state = self.checkpoints.restore() or {"num_steps_done": 0, "loss": None, "seconds": 0.0}
        done, loss = state["num_steps_done"], state["loss"]
        start = time.perf_counter() - state["seconds"]
        stages = self.stages
        while done < config.run.num_steps:
            stages.step = done + 1
            position = done * config.sft.batch_size
            with stages("data"):
                batch = self.examples.take(position, config.sft.batch_size)
            with stages("update"):
                updated = self._update(batch, position)
            done += 1
            loss = updated["loss"]
            last = done == config.run.num_steps
            if last or done % config.sft.log_every_steps == 0:
                self.metrics.log(done, {f"sft/{name}": value for name, value in updated.items()} | stages.drain())
            self.checkpoints.check()
            stopping = not last and self.should_stop()
            saving = last or stopping or is_due(done, config.checkpoint.every_steps)
            if saving:
                seconds = time.perf_counter() - start
                with stages("checkpoint"):
                    state = {"num_steps_done": done, "loss": loss, "seconds": seconds}
                    self.checkpoints.save(done, state, background=not (last or stopping))
            # A request that came while it was saved needs no other step.
            stopping = stopping or (saving and not last and self.should_stop())
            if last or stopping:
                with stages("checkpoint"):
                    self.checkpoints.finish()
            if stopping:
                raise RunInterrupted(f"stopped as asked and saved after step {done}")
        return {"num_steps": done, "final_loss": loss, "wall_seconds": time.perf_counter() - start}

    def _update(self, batch: Sequence[SftExample], position: int) -> dict[str, float]:
        try:
            return self.model.update(batch)
        except NonFiniteError as error:
            first, last = position, position + len(batch) - 1
            raise NonFiniteError(
                f"step {self.stages.step}, examples {first} to {last} in the run's order: {error}"
            ) from error
