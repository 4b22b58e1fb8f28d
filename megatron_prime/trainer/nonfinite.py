"""Keeping what an update was made of that is infinite or no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_prime.batch import ModelUpdate, UpdateResult
from megatron_prime.errors import NonFiniteError
from megatron_prime.interfaces import FailedUpdates


@contextmanager
def kept_if_nonfinite(update: ModelUpdate, files: FailedUpdates) -> Iterator[Callable[[UpdateResult], None]]:
    """Keeps an update whose steps, in the ``with`` block, are left out or end the run.

    Args:
        update: what the block trains on.
        files: where it goes.

    Yields:
        To be called with what the update has shown.

    Raises:
        NonFiniteError: the block's own, with the role, the step and the file.
    """

    def report(result: UpdateResult) -> None:
        if result.metrics.get("skipped", 0.0) > 0:
            files.keep(update, "optimizer steps were left out and the run went on")

    try:
        yield report
    except NonFiniteError as error:
        path = files.keep(update, str(error))
        raise NonFiniteError(
            f"{update.role} update of step {update.step}: {error}\nwhich response it was: megatron-prime replay {path}"
        ) from error
