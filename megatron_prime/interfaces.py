"""What the parts of a run are to each other: every protocol that crosses rooms, once.

The trainer knows its parts by these alone; users who bring their own part implement one of them (docs/howto/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_prime.batch import (
    ModelUpdate,
    PrmBatch,
    Prompt,
    Response,
    RolloutBatch,
    SamplingParams,
    SftExample,
    StepSpan,
    UpdateResult,
    Verdict,
)
from megatron_prime.config.schema import RolloutSection
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.shards import ShardSlice

OnAnswer = Callable[[int, int, Response], None]
"""Takes the number of the prompt, the number of the answer, and the answer."""

_REASONS = {
    "too_long": "with prompts of more than data.max_prompt_tokens",
    "response_too_long": "with responses of more than data.max_response_tokens",
    "no_answer": "without an answer to check against",
    "in_evaluation": "whose prompts are among data.evaluation",
    "other_ability": "of an ability that is not in data.abilities",
}


_MAX_VALUES = 5
"""Values that are named of each reason at the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropCounts:
    """Rows that a source leaves out."""

    num_rows: int
    """Rows read, with those left out."""
    by_reason: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by the keys of `_REASONS`."""
    by_value: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of some reasons, what the rows had in the decisive place."""

    @property
    def num_dropped(self) -> int:
        """Rows left out for any reason."""
        return sum(self.by_reason.values())

    def __str__(self) -> str:
        """What was left out and why, with the keys of the configuration that decide it."""
        parts = [f"{count} {_REASONS[reason]}{self._met(reason)}" for reason, count in self.by_reason.items()]
        return "; ".join(parts) or "nothing"

    def _met(self, reason: str) -> str:
        values = sorted(self.by_value.get(reason, {}).items(), key=lambda entry: -entry[1])
        shown = ", ".join(f"'{value}' {count}" for value, count in values[:_MAX_VALUES])
        return f" ({shown}{', ..' if len(values) > _MAX_VALUES else ''})" if shown else ""


class Resident(Protocol):
    """A model that may give memory away while it does not compute."""

    def sleep(self) -> None: ...

    def wake(self, *, training: bool = False) -> None: ...


class Policy(Resident, Protocol):
    """The model that learns to answer."""

    def score(self, batch: RolloutBatch, *, temperature: float) -> torch.Tensor: ...

    def update(
        self,
        batch: RolloutBatch,
        advantages: torch.Tensor,
        *,
        old_logprobs: torch.Tensor | None,
        reference_logprobs: torch.Tensor | None,
        temperature: float,
        seed: int,
    ) -> UpdateResult: ...

    def export_weights(self) -> ExportedWeights: ...


class Reference(Resident, Protocol):
    """The frozen model."""

    def score(self, batch: RolloutBatch) -> torch.Tensor: ...


class RewardModel(Resident, Protocol):
    """The implicit process reward model. Scoring never trains."""

    def score(self, batch: RolloutBatch) -> torch.Tensor: ...

    @property
    def scores_in_update(self) -> bool:
        """Whether `update` can do without scores."""
        ...

    def update(
        self,
        batch: RolloutBatch,
        *,
        reference_logprobs: torch.Tensor,
        prm_logprobs: torch.Tensor | None,
        window: Sequence[PrmBatch],
        seed: int,
    ) -> UpdateResult: ...


class Imitator(Protocol):
    """The model of a supervised run."""

    def update(self, examples: Sequence[SftExample]) -> dict[str, float]: ...


class ExportedWeights(Protocol):
    """Weights that an engine can take as a stream or slice by slice (`weights.stream.WeightExport`)."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def tensors(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]: ...

    def slices(self) -> Iterator[ShardSlice]: ...

    def gather(self, value: Any) -> list[Any]: ...


class Engine(Protocol):
    """Samples answers with weights that the trainer streams into it.

    `generate` and `load_weights` are collective: every rank calls them with equal arguments.
    """

    weight_version: int
    """Version of the loaded weights, -1 while there are none."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """Samples ``sampling.num_responses`` answers for each prompt.

        Args:
            prompts: the same ones, in the same order, on every rank.
            sampling: how to sample.
            on_answer: called on one rank for an answer as soon as it has ended, where the engine knows that before
                all have; must return quickly.

        Returns:
            On every rank, for each prompt in order, its answers in order.

        Raises:
            RolloutError: there are no usable weights, or a prompt does not fit the model.
        """
        ...

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """Replaces all weights.

        Args:
            weights: (Hugging Face parameter name, whole tensor) pairs, always read to their end; an engine in another
                process may take a `weights.stream.WeightExport` apart instead.
            version: reported by every response sampled with these weights.

        Returns:
            Checksum of what the engine holds after loading, which is that of what was sent.

        Raises:
            RolloutError: the weights are not exactly the model's parameters, are not finite, or did not arrive
                unchanged; lists all problems. The engine then refuses to generate until a load succeeds.
        """
        ...

    def sleep(self) -> None:
        """Gives accelerator memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Undoes `sleep`."""
        ...

    def close(self) -> None:
        """Frees everything; the engine cannot be used afterwards."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Where a rank stands among the copies of the trained model; the defaults are those of a process that is alone."""

    device: torch.device
    """Where this rank computes."""
    copy_index: int = 0
    """Which copy of the model this rank holds a part of."""
    num_copies: int = 1
    rank_in_copy: int = 0
    """Which of the copy's ranks this is; rank 0 of copy 0 is global rank 0."""
    ranks_per_copy: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """What a rollout engine is built from: the argument of every factory that `rollout.engine` can name."""

    folder: str
    """Hugging Face folder of the model; its weights come by `Engine.load_weights`."""
    dtype: str
    """``float32`` or ``bfloat16``: of parameters and activations."""
    section: RolloutSection
    architecture: ModelArchitecture
    place: RankPlace
    num_threads: int
    """CPU threads of each rank."""
    end_token_ids: tuple[int, ...]
    """End an answer, besides ``SamplingParams.stop_token_ids``."""
    decode: Callable[[Sequence[int]], str]
    """Tokens of an answer (without the token that ended it) to text."""


class Verifier(Protocol):
    """Judges responses. Every rank has its own and judges its own share; equal input must get equal verdicts."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """Hands in one response and returns at once, or when there is room.

        Args:
            prompt: with its ground truth and ability.
            response: one of its answers.

        Returns:
            The verdict to come. Its reward is in [0, 1], or None where the verifier itself failed.
        """
        ...

    def close(self) -> None:
        """Ends what `submit` has started."""
        ...


class PromptSource(Protocol):
    """Prompts in a seeded order, addressed by their position since the start of training."""

    @property
    def dropped(self) -> DropCounts:
        """What was left out of the training prompts."""
        ...

    def __len__(self) -> int:
        """Prompts of an epoch."""
        ...

    def take(self, position: int, count: int) -> list[Prompt]:
        """Prompts `position` .. `position + count - 1` since the start of training; each epoch has its own order."""
        ...

    def evaluation(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts, the same in every run; fewer where there are fewer."""
        ...

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...] | None:
        """The steps of a response and which are right; None where the source cannot know."""
        ...


class SftSource(Protocol):
    """Supervised examples, addressed in the same way."""

    @property
    def dropped(self) -> DropCounts:
        """What was left out."""
        ...

    def __len__(self) -> int:
        """Examples of an epoch."""
        ...

    def take(self, position: int, count: int) -> list[SftExample]:
        """Examples `position` .. `position + count - 1` since the start of training."""
        ...


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


class MetricsLogger(Protocol):
    """Where metrics go besides metrics.jsonl and the console (`run.loggers`). Only the main process has loggers.

    One that raises is reported once and left out; the run goes on.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step; the loop waits for it.

        Args:
            step: number of the step; 0 is before training. A resumed run begins after its checkpoint's step, whatever
                was logged before.
            metrics: finite values by ``room/name``.
        """
        ...

    def close(self) -> None:
        """Writes what is left and frees everything; nothing is logged afterwards."""
        ...


class Logger(Protocol):
    """Metrics of one step, and what is going on right now."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def progress(self, stage: str) -> None: ...
