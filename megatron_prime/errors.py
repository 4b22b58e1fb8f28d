"""One exception tree. Every error a user can cause names the key or file at fault and the fix."""

from __future__ import annotations

from collections.abc import Sequence


class PrimeError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(PrimeError, ValueError):
    """A configuration that cannot run; carries *all* problems found, not only the first.

    Args:
        problems: one line per problem, each starting with the full key path (``prm.beta: ...``).
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(PrimeError, ValueError):
    """A dataset, prompt or tokenizer that cannot be used; names the file and the row or field."""


class WeightsError(PrimeError, ValueError):
    """A model folder or weight set that is unknown, incomplete, misshapen or damaged."""


class CheckpointError(PrimeError, RuntimeError):
    """A checkpoint that cannot be written, found or loaded."""


class RolloutError(PrimeError, RuntimeError):
    """The rollout engine failed or disagrees with the trainer about its weights."""


class VerifierError(PrimeError, RuntimeError):
    """The verifier itself failed (never: a wrong answer)."""


class RunInterrupted(PrimeError):
    """The run was asked to stop and has saved; the same command goes on from there."""


class LaunchError(PrimeError, RuntimeError):
    """A cluster that is not there or refuses the job."""


class TrainingError(PrimeError, RuntimeError):
    """Training cannot go on: no usable groups, ranks that disagree."""


class NonFiniteError(TrainingError):
    """A loss, gradient or weight that is NaN or Inf.

    Args:
        message: what was not finite.
        logprobs: [B, R], of the model before the update that failed, where its first forward pass gave them.
    """

    def __init__(self, message: str, logprobs: object = None) -> None:
        super().__init__(message)
        self.logprobs = logprobs
