"""Small in-memory parts for the loop: answers follow a script, models count their updates.

The loop's own logic is under test here; real models, engine and verifier run it in tests/distributed and
tests/integration.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from megatron_prime.batch import (
    ModelUpdate,
    PrmBatch,
    Prompt,
    Response,
    RolloutBatch,
    SamplingParams,
    StepSpan,
    UpdateResult,
    Verdict,
)
from megatron_prime.config.schema import (
    AdvantageSection,
    ArithmeticData,
    CheckpointSection,
    EvaluationSection,
    FilterSection,
    ModelSection,
    PrimeConfig,
    PrmSection,
    RolloutSection,
    RunSection,
)
from megatron_prime.errors import NonFiniteError
from megatron_prime.trainer.parts import PrimeParts
from megatron_prime.trainer.prime import PrimeTrainer
from megatron_prime.weights.checksum import WeightChecksum

VERDICTS = {"1": Verdict(status="correct", reward=1.0), "0": Verdict(status="wrong", reward=0.0)}
MISSING = Verdict(status="timeout", reward=None)


class NumberedPrompts:
    """Prompt ``n`` has the id ``str(n)`` and the token ``n + 1``; none has known steps."""

    def take(self, position: int, count: int) -> list[Prompt]:
        return [
            Prompt(prompt_id=str(n), text="", token_ids=(n + 1,), ground_truth="")
            for n in range(position, position + count)
        ]

    def evaluation(self, count: int) -> list[Prompt]:
        return [Prompt(prompt_id=f"held out {n}", text="", token_ids=(n + 1,), ground_truth="") for n in range(count)]

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...] | None:
        return None


class ScriptedEngine:
    """Answers prompt ``n`` with the characters of ``script[n]``, the last entry for all that follow.

    Args:
        script: one string per prompt: 1 right, 0 wrong, ? without a verdict.
        held_out: the answers to every evaluation prompt.
    """

    def __init__(self, script: Sequence[str], held_out: str = "1") -> None:
        self.script = script
        self.held_out = held_out
        self.requests: list[tuple[list[str], SamplingParams]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.weight_version = -1
        self.is_asleep = False

    @property
    def num_prompts(self) -> list[int]:
        """Prompts of each call."""
        return [len(prompts) for prompts, _ in self.requests]

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_answer: Callable[[int, int, Response], None] | None = None,
    ) -> list[list[Response]]:
        assert not self.is_asleep
        self.requests.append(([prompt.prompt_id for prompt in prompts], sampling))
        logprob = -(float(self.weights.get("w", torch.zeros(1))) + 1) / (sampling.temperature or 1.0)
        return [
            [_response(text, logprob, self.weight_version) for text in self._texts(prompt.prompt_id)]
            for prompt in prompts
        ]

    def _texts(self, prompt_id: str) -> str:
        if prompt_id.startswith("held out"):
            return self.held_out
        return self.script[min(int(prompt_id), len(self.script) - 1)]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        self.weights = {name: tensor.clone() for name, tensor in weights}
        self.weight_version = version
        checksum = WeightChecksum()
        for name, tensor in self.weights.items():
            checksum.update(name, tensor)
        return checksum.hexdigest()

    def sleep(self) -> None:
        self.is_asleep = True

    def wake(self) -> None:
        self.is_asleep = False


def _response(text: str, logprob: float, version: int) -> Response:
    return Response(
        text=text, token_ids=(7, 1), logprobs=(logprob, logprob), finish_reason="stop", weight_version=version
    )


class ScriptVerifier:
    """Reads the verdict off the answer."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        future.set_result(VERDICTS.get(response.text, MISSING))
        return future


class Sleeper:
    """A model that must be awake for whatever it does."""

    is_awake = trains = False

    def sleep(self) -> None:
        self.is_awake = self.trains = False

    def wake(self, *, training: bool = False) -> None:
        self.is_awake, self.trains = True, training


class CountingPolicy(Sleeper):
    """A policy whose one weight is its number of updates, and whose log-probs are -(updates + 1) / temperature."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.weight = torch.zeros(1)
        self.fails = False
        """Whether its updates are not finite."""
        self.batches: list[tuple[RolloutBatch, torch.Tensor]] = []

    def score(self, batch: RolloutBatch, *, temperature: float) -> torch.Tensor:
        assert self.is_awake
        self.events.append(f"policy scores at {temperature:g}")
        return self.logprobs(batch, temperature)

    def logprobs(self, batch: RolloutBatch, temperature: float) -> torch.Tensor:
        return batch.mask * -(self.weight + 1) / temperature

    def update(
        self,
        batch: RolloutBatch,
        advantages: torch.Tensor,
        *,
        old_logprobs: torch.Tensor | None,
        reference_logprobs: torch.Tensor | None,
        temperature: float,
        seed: int,
    ) -> UpdateResult:
        assert self.trains
        before = self.logprobs(batch, temperature) if old_logprobs is None else old_logprobs
        if self.fails:
            raise NonFiniteError("loss nan", before)
        self.events.append("policy trains")
        self.batches.append((batch, advantages))
        self.weight += 1
        return UpdateResult(metrics={"loss": 0.0}, logprobs=before)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", self.weight


class CountingReference(Sleeper):
    """A reference with log-probs of -1."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def score(self, batch: RolloutBatch) -> torch.Tensor:
        assert self.is_awake
        self.events.append("reference scores")
        return -batch.mask.float()


class CountingPrm(Sleeper):
    """A PRM that gives right answers 1 + its number of updates more than the reference, and wrong ones as much less."""

    def __init__(self, events: list[str], scores_in_update: bool) -> None:
        self.events = events
        self.scores_in_update = scores_in_update
        self.num_updates = 0
        self.windows: list[list[RolloutBatch]] = []

    def score(self, batch: RolloutBatch) -> torch.Tensor:
        assert self.is_awake
        self.events.append("prm scores")
        return self.logprobs(batch)

    def logprobs(self, batch: RolloutBatch) -> torch.Tensor:
        sign = (2 * batch.outcomes - 1)[:, None]
        return batch.mask * (-1 + sign * (1 + self.num_updates))

    def update(
        self,
        batch: RolloutBatch,
        *,
        reference_logprobs: torch.Tensor,
        prm_logprobs: torch.Tensor | None,
        window: Sequence[PrmBatch],
        seed: int,
    ) -> UpdateResult:
        assert self.trains
        self.events.append("prm trains")
        self.windows.append([*(older.rollout for older in window), batch])
        before = self.logprobs(batch) if prm_logprobs is None else prm_logprobs
        self.num_updates += 1
        return UpdateResult(metrics={"loss": 0.0}, logprobs=before)


class MemoryCheckpoints:
    """Keeps pickled trainer states."""

    def __init__(self) -> None:
        self.saved: dict[int, bytes] = {}

        self.accuracies: dict[int, float | None] = {}
        self.awaited: set[int] = set()
        self.in_background: set[int] = set()

    def save(
        self,
        step: int,
        trainer_state: Mapping[str, Any],
        *,
        accuracy: float | None = None,
        background: bool = True,
    ) -> None:
        self.saved[step] = pickle.dumps(dict(trainer_state))
        self.accuracies[step] = accuracy
        if background:
            self.in_background.add(step)

    def check(self) -> None: ...

    def finish(self) -> None:
        self.awaited.add(max(self.saved))

    def restore(self) -> Mapping[str, Any] | None:
        return pickle.loads(self.saved[max(self.saved)]) if self.saved else None


class MemoryUpdates:
    """Keeps updates that are not finite, with the reasons."""

    def __init__(self) -> None:
        self.kept: list[tuple[ModelUpdate, str]] = []

    def keep(self, update: ModelUpdate, reason: str) -> Path:
        self.kept.append((update, reason))
        return Path(f"{update.role}_{update.step}.pt")


class MemoryLogger:
    """Keeps rows and stages."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.stages: list[str] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows[step] = dict(metrics)

    def progress(self, stage: str) -> None:
        self.stages.append(stage)


def make_config(**sections: Any) -> PrimeConfig:
    """Three steps of four prompts with four answers; sections replace the ones here."""
    defaults: dict[str, Any] = {
        "run": RunSection(name="test", num_steps=3),
        "model": ModelSection(path="none"),
        "data": ArithmeticData(),
        "rollout": RolloutSection(num_prompts=4, num_responses=4, max_response_tokens=8),
        "filter": FilterSection(max_attempts=3),
        "prm": PrmSection(beta=0.1),
        "advantage": AdvantageSection(process_gate="none"),
        "evaluation": EvaluationSection(num_prompts=0),
        "checkpoint": CheckpointSection(every_steps=0),
    }
    return PrimeConfig(**{**defaults, **sections})


def make_trainer(
    config: PrimeConfig,
    engine: ScriptedEngine,
    *,
    reference: bool = True,
    prm: bool = True,
    scores_in_update: bool = True,
    min_groups: int = 2,
    checkpoints: MemoryCheckpoints | None = None,
) -> tuple[PrimeTrainer, list[str]]:
    """The loop around fresh parts, and the list in which its models write what they are asked to do."""
    events: list[str] = []
    parts = PrimeParts(
        policy=CountingPolicy(events),
        reference=CountingReference(events) if reference else None,
        prm=CountingPrm(events, scores_in_update) if prm else None,
        engine=engine,
        verifier=ScriptVerifier(),
        prompts=NumberedPrompts(),
        checkpoints=checkpoints or MemoryCheckpoints(),
        logger=MemoryLogger(),
        failed_updates=MemoryUpdates(),
        min_groups=min_groups,
    )
    return PrimeTrainer(config, parts), events
