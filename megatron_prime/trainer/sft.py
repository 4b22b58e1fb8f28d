"""Supervised fine-tuning: makes the model that PRIME starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_prime.config.schema import SftConfig
from megatron_prime.errors import NonFiniteError
from megatron_prime.interfaces import Checkpoints, Imitator, Logger, SftSource
from megatron_prime.trainer.loop import Loop


class SftTrainer(Loop):
    """Trains one supervised run.

    Args:
        config: the checked configuration.
        model: the model to train.
        examples: prompts with answers.
        checkpoints: saves and restores the state.
        metrics: receives metrics.
        should_stop: asked after every step, by all ranks together.
        enter: called with the phase and the step whenever a stage starts or ends.
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
        super().__init__(
            config.run.num_steps,
            config.checkpoint,
            checkpoints,
            metrics,
            should_stop=should_stop,
            enter=enter,
            log_every_steps=config.sft.log_every_steps,
        )
        self.config = config
        self.model = model
        self.examples = examples
        self.loss: float | None = None
        """Loss of the latest step; None before the first."""

    def begin(self, *, is_resumed: bool) -> None:
        """Does nothing: a supervised run has no engine to prepare."""

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        size = self.config.sft.batch_size
        position = self.num_steps_done * size
        with self.stages("data"):
            batch = self.examples.take(position, size)
        try:
            with self.stages("update"):
                updated = self.model.update(batch)
        except NonFiniteError as error:
            rows = f"examples {position} to {position + len(batch) - 1} in the run's order"
            raise NonFiniteError(f"step {self.stages.step}, {rows}: {error}", error.logprobs) from error
        self.loss = updated["loss"]
        return {f"sft/{name}": value for name, value in updated.items()}

    def summary(self) -> dict[str, Any]:
        """Steps, the last loss, and the seconds."""
        return {"num_steps": self.num_steps_done, "final_loss": self.loss, "wall_seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """See `Loop.state_dict`."""
        return {"loss": self.loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Loop.load_state_dict`."""
        self.loss = state["loss"]
