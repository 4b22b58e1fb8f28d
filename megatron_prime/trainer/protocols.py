"""What the trainer needs of the parts it is given; it knows no concrete class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_prime.batch import (
    ModelUpdate,
    Prompt,
    Response,
    RolloutBatch,
    SamplingParams,
    ScoredBatch,
    SftExample,
    StepSpan,
    UpdateResult,
    Verdict,
)


class Resident(Protocol):
    """A model that may give memory away while it does not compute."""

    def sleep(self) -> None: ...

    def wake(self, *, training: bool = False) -> None: ...


class Policy(Resident, Protocol):
    """The model that learns to answer."""

    def score(self, batch: RolloutBatch, *, temperature: float) -> torch.Tensor: ...

    def update(
        self,
        batch: ScoredBatch,
        advantages: torch.Tensor,
        *,
        temperature: float,
        seed: int,
        check: Callable[[torch.Tensor], None] | None = None,
    ) -> UpdateResult: ...

    def export_weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...


class Reference(Resident, Protocol):
    """The frozen model."""

    def score(self, batch: RolloutBatch) -> torch.Tensor: ...


class RewardModel(Resident, Protocol):
    """The implicit process reward model. Scoring never trains."""

    def score(self, batch: RolloutBatch) -> torch.Tensor: ...

    def update(self, batches: Sequence[ScoredBatch], *, seed: int) -> UpdateResult: ...


class Imitator(Protocol):
    """The model of a supervised run."""

    def update(self, examples: Sequence[SftExample]) -> dict[str, float]: ...


class Engine(Protocol):
    """The rollout engine; every rank calls it with the same arguments."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_answer: Callable[[int, int, Response], None] | None = None,
    ) -> list[list[Response]]: ...

    def load_weights(self, weights: Any, version: int) -> str: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Verifier(Protocol):
    """Outcome labels for this process's share of the answers."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]: ...


class Prompts(Protocol):
    """The prompts of a run, addressed by position."""

    def take(self, position: int, count: int) -> list[Prompt]: ...

    def evaluation(self, count: int) -> list[Prompt]: ...

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...] | None: ...


class Examples(Protocol):
    """The examples of a supervised run, addressed by position."""

    def take(self, position: int, count: int) -> list[SftExample]: ...


class Checkpoints(Protocol):
    """Saves and restores models, optimizers and the trainer's own state together."""

    def save(
        self,
        step: int,
        trainer_state: Mapping[str, Any],
        *,
        accuracy: float | None = None,
        background: bool = True,
    ) -> None: ...

    def check(self) -> None: ...

    def finish(self) -> None: ...

    def restore(self) -> Mapping[str, Any] | None: ...


class FailedUpdates(Protocol):
    """Keeps what updates that are not finite were made of."""

    def keep(self, update: ModelUpdate, reason: str) -> Path: ...


class Logger(Protocol):
    """Metrics of one step, and what is going on right now."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def progress(self, stage: str) -> None: ...
