"""Handles optimizer steps whose loss or gradients are NaN or Inf: ends the run, or skips them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from megatron_prime.config.schema import OptimizerSection
from megatron_prime.errors import NonFiniteError

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Decides about one model's optimizer steps before they change anything.

    Args:
        section: ``on_nonfinite`` and ``max_skipped_steps``.
    """

    def __init__(self, section: OptimizerSection) -> None:
        self._section = section
        self._num_in_row = 0

    def skip(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether to skip an optimizer step.

        Args:
            metrics: of its forward and backward pass, the same on every rank.

        Raises:
            NonFiniteError: skipping is off, or too many steps in a row were skipped.
        """
        values = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
        if not values:
            self._num_in_row = 0
            return False
        text = f"not finite: {values}; no weight has changed"
        if self._section.on_nonfinite == "stop":
            raise NonFiniteError(f"{text}. Lower the learning rate, check the data, or set on_nonfinite=skip")
        self._num_in_row += 1
        limit = self._section.max_skipped_steps
        if self._num_in_row > limit:
            raise NonFiniteError(
                f"{text}, and the {limit} optimizer steps before it were left out as well (max_skipped_steps); "
                "continue from an earlier checkpoint with a lower learning rate"
            )
        logger.warning("left out an optimizer step, %d in a row: %s", self._num_in_row, text)
        return True
