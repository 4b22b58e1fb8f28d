"""Supervised fine-tuning: makes the model that PRIME starts from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from megatron_prime.config.schema import SftConfig
from megatron_prime.errors import RunInterrupted
from megatron_prime.trainer.protocols import Checkpoints, Examples, Imitator, Logger
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
    """

    def __init__(
        self,
        config: SftConfig,
        model: Imitator,
        examples: Examples,
        checkpoints: Checkpoints,
        metrics: Logger,
        should_stop: Callable[[], bool] = bool,
    ) -> None:
        self.config = config
        self.model = model
        self.examples = examples
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.should_stop = should_stop

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary of the run."""
        config = self.config
        state = self.checkpoints.restore() or {"num_steps_done": 0, "loss": None, "seconds": 0.0}
        done, loss = state["num_steps_done"], state["loss"]
        start = time.perf_counter() - state["seconds"]
        stages = Stages(self.metrics.progress)
        while done < config.run.num_steps:
            with stages("update"):
                batch = self.examples.take(done * config.sft.batch_size, config.sft.batch_size)
                updated = self.model.update(batch)
            done += 1
            loss = updated["loss"]
            last = done == config.run.num_steps
            if last or done % config.sft.log_every_steps == 0:
                self.metrics.log(done, {f"sft/{name}": value for name, value in updated.items()} | stages.drain())
            stopping = not last and self.should_stop()
            if last or stopping or (config.checkpoint.every_steps > 0 and done % config.checkpoint.every_steps == 0):
                seconds = time.perf_counter() - start
                self.checkpoints.save(done, {"num_steps_done": done, "loss": loss, "seconds": seconds})
            if stopping:
                raise RunInterrupted(f"stopped as asked and saved after step {done}")
        return {"num_steps": done, "final_loss": loss, "wall_seconds": time.perf_counter() - start}
