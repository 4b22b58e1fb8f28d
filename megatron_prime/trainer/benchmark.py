"""Answers to the problems of a benchmark, graded and kept as they come, so that an interrupted evaluation goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prime.batch import Prompt, Response, SamplingParams, Verdict
from megatron_prime.errors import DataError, RunInterrupted
from megatron_prime.trainer.evaluation import sample_and_verify
from megatron_prime.trainer.protocols import Engine, Verifier
from megatron_prime.trainer.scores import score_answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A graded answer as it is kept."""

    prompt_id: str
    number: int
    """Which of the problem's answers."""
    text: str
    finish_reason: str
    num_tokens: int
    status: str
    reward: float | None
    extracted: str | None
    seconds: float
    """Of grading."""

    @classmethod
    def of(cls, prompt: Prompt, number: int, response: Response, verdict: Verdict) -> Answer:
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
    def from_row(cls, row: Mapping[str, Any], where: str) -> Answer:
        """Undoes `row`.

        Raises:
            DataError: the row was not written by this class.
        """
        try:
            return cls(**row)
        except TypeError as error:
            raise DataError(f"{where}: not an answer of this evaluation; move the folder away") from error

    def row(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return asdict(self)


def answer_problems(
    engine: Engine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    done: Collection[str],
    keep: Callable[[list[Answer]], None],
    chunk_size: int,
    should_stop: Callable[[], bool],
) -> None:
    """Answers and grades the problems that are not done yet.

    What an answer is drawn from depends on the seed, the problem and the answer's number only, so it does not matter
    where an earlier call has stopped.

    Args:
        engine: with weights.
        verifier: for all abilities of the prompts.
        prompts: all problems.
        sampling: how to answer.
        done: ids of problems that have all their answers.
        keep: takes the answers of some problems, all of each.
        chunk_size: problems sampled together; as many are lost at the most when the process is killed.
        should_stop: asked between chunks.

    Raises:
        RunInterrupted: `should_stop` said so.
    """
    left = [prompt for prompt in prompts if prompt.prompt_id not in done]
    for start in range(0, len(left), chunk_size):
        if should_stop():
            raise RunInterrupted(f"stopped with {len(left) - start} of {len(prompts)} problems to go")
        chunk = left[start : start + chunk_size]
        rows = sample_and_verify(engine, verifier, chunk, sampling)
        keep([Answer.of(p, i, *pair) for p, row in zip(chunk, rows, strict=True) for i, pair in enumerate(row)])


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
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


def problem_means(answers: Sequence[Answer]) -> list[float]:
    """Mean reward of each problem that has a verdict."""
    by_prompt: dict[str, list[float]] = {}
    for answer in answers:
        if answer.reward is not None:
            by_prompt.setdefault(answer.prompt_id, []).append(answer.reward)
    return [sum(row) / len(row) for row in by_prompt.values()]
