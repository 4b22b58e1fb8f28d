"""Keeping what an update was made of that is NaN or Inf."""

from __future__ import annotations

from collections.abc import Callable

from megatron_prime.batch import ModelUpdate, UpdateResult
from megatron_prime.errors import NonFiniteError
from megatron_prime.interfaces import FailedUpdates


def update_or_keep(
    train: Callable[[], UpdateResult], record: Callable[[object], ModelUpdate], files: FailedUpdates
) -> UpdateResult:
    """Trains a model, and keeps what it trained on where a step is left out or ends the run.

    Args:
        train: updates the model.
        record: what it trains on, given the model's log-probs [B, R] from before the update.
        files: where that goes.

    Raises:
        NonFiniteError: the update's own, with the role, the step and the file.
    """
    try:
        result = train()
    except NonFiniteError as error:
        update = record(error.logprobs)
        path = files.keep(update, str(error))
        raise NonFiniteError(
            f"{update.role} update of step {update.step}: {error}\nwhich response it was: megatron-prime replay {path}"
        ) from error
    if result.metrics.get("skipped", 0.0) > 0:
        files.keep(record(result.logprobs), "optimizer steps were left out and the run went on")
    return result
