"""Answers, grades and stores a benchmark's problems one by one, so that an interrupted evaluation can continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prime.batch import Prompt, Response, SamplingParams, Verdict
from megatron_prime.errors import DataError, RunInterrupted
from megatron_prime.evaluation.scores import score_answers
from megatron_prime.interfaces import Engine, Verifier


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedAnswer:
    """A graded answer as it is kept."""

    prompt_id: str
    number: int
    """Number of the answer among the problem's answers."""
    text: str
    finish_reason: str
    num_tokens: int
    status: str
    reward: float | None
    extracted: str | None
    seconds: float
    """Seconds of grading."""

    @classmethod
    def of(cls, prompt: Prompt, number: int, response: Response, verdict: Verdict) -> GradedAnswer:
        """From what engine and verifier have said."""
        return cls(
            prompt_id=prompt.prompt_id,
            number=number,
            text=response.text,
            finish_reason=response.finish_reason,
            num_tokens=len(response.token_ids),
            status=verdict.status,
            reward=verdict.reward,
            extracted=verdict.extracted,
            seconds=round(verdict.seconds, 4),
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> GradedAnswer:
        """Undoes `row`.

        Raises:
            DataError: the row was not written by this class.
        """
        try:
            return cls(**row)
        except TypeError as error:
            raise DataError(f"{where}: not an answer of this evaluation; move the folder away") from error

    def row(self) -> dict[str, Any]:
        """Returns the row as it is written to JSON."""
        return asdict(self)


def answer_problems(
    engine: Engine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    kept: Collection[tuple[str, int]],
    keep: Callable[[list[GradedAnswer]], None],
    should_stop: Callable[[], bool],
) -> None:
    """Answers and grades what is missing, in this process alone.

    What an answer is drawn from depends on the seed, the problem and the answer's number only, so it does not matter
    where an earlier call has stopped.

    Args:
        engine: with weights.
        verifier: for all abilities of the prompts.
        prompts: all problems.
        sampling: how to answer.
        kept: (prompt id, number) of the answers that exist already. A problem is asked again as long as one of its
            answers is missing.
        keep: takes new answers as soon as they are graded, while others are still sampled.
        should_stop: asked whenever an answer has ended.

    Raises:
        RunInterrupted: `should_stop` was true; answers that had ended are graded and kept.
    """
    numbers = range(sampling.num_responses)
    left = [prompt for prompt in prompts if any((prompt.prompt_id, number) not in kept for number in numbers)]
    submitted = set(kept)
    pending: list[tuple[Prompt, int, Response, Future[Verdict]]] = []

    def keep_graded(*, wait: bool) -> None:
        graded, waiting = [], []
        for item in pending:
            (graded if wait or item[3].done() else waiting).append(item)
        pending[:] = waiting
        if graded:
            keep(
                [
                    GradedAnswer.of(prompt, number, response, future.result())
                    for prompt, number, response, future in graded
                ]
            )

    def grade(place: int, number: int, response: Response) -> None:
        prompt = left[place]
        if (prompt.prompt_id, number) not in submitted:
            submitted.add((prompt.prompt_id, number))
            pending.append((prompt, number, response, verifier.submit(prompt, response)))
        keep_graded(wait=False)
        if should_stop():
            raise RunInterrupted(f"{prompt.data_source}: stopped on request")

    try:
        responses = engine.generate(left, sampling, grade) if left else []
        # An engine need not hand out its answers one by one.
        for place, row in enumerate(responses):
            for number, response in enumerate(row):
                grade(place, number, response)
    finally:
        keep_graded(wait=True)


def summarize(answers: Sequence[GradedAnswer]) -> dict[str, Any]:
    """What goes into the result of a benchmark."""
    by_prompt: dict[str, list[float | None]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt_id, []).append(answer.reward)
    count = max(1, len(answers))
    return {
        "num_problems": len(by_prompt),
        "num_answers": len(answers),
        "num_missing": sum(answer.reward is None for answer in answers),
        "scores": {name: score.row() for name, score in score_answers(list(by_prompt.values())).items()},
        "share_cut_off": sum(answer.finish_reason == "length" for answer in answers) / count,
        "mean_tokens": sum(answer.num_tokens for answer in answers) / count,
        "statuses": dict(sorted(Counter(answer.status for answer in answers).items())),
    }


def problem_means(answers: Sequence[GradedAnswer]) -> list[float]:
    """Mean reward of each problem that has a verdict."""
    by_prompt: dict[str, list[float]] = {}
    for answer in answers:
        if answer.reward is not None:
            by_prompt.setdefault(answer.prompt_id, []).append(answer.reward)
    return [sum(row) / len(row) for row in by_prompt.values()]
