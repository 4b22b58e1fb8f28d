"""Sampling and grading, for training and for evaluation alike."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace

from megatron_prime import collectives, heartbeat
from megatron_prime.batch import Prompt, Response, SamplingParams, Verdict
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.interfaces import Engine, Verifier

_Z95 = 1.959964
MAX_MISSING = 0.01
"""Share of answers that may be left without a verdict before the log says so."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Mean reward over k answers (avg@k) with its 95% interval."""

    value: float
    low: float
    high: float
    num_prompts: int
    num_missing: int
    """Answers without a verdict; they count as wrong, and in the upper end of the interval as right."""
    num_answers: int

    def metrics(self) -> dict[str, float]:
        """Returns the values under their names in the metrics log."""
        return {
            "evaluation/accuracy": self.value,
            "evaluation/accuracy_low": self.low,
            "evaluation/accuracy_high": self.high,
            "evaluation/missing": self.num_missing / self.num_answers if self.num_answers else 0.0,
        }


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def evaluation_sampling(config: PrimeConfig) -> SamplingParams:
    """Returns sampling parameters for evaluation, seeded by the run and by nothing that training changes."""
    return SamplingParams(
        num_responses=config.evaluation.num_responses,
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_response_tokens=config.rollout.max_response_tokens,
        seed=derive_seed(config.run.seed, "evaluation"),
        stop_token_ids=tuple(config.rollout.stop_token_ids),
    )


def sample_and_verify(
    engine: Engine, verifier: Verifier, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[list[tuple[Response, Verdict]]]:
    """Samples and grades answers; returns them with their verdicts, per prompt, on every rank.

    Answers that the engine reports early are graded on the rank that received them, while others are still sampled.
    The rest is divided over the ranks. A prompt that occurs twice gets different answers each time.
    """
    pending: dict[tuple[int, int], Future[Verdict]] = {}

    def grade(prompt: int, answer: int, response: Response) -> None:
        pending[prompt, answer] = verifier.submit(prompts[prompt], response)

    responses = engine.generate(_deduplicated(prompts), sampling, grade)
    early = set().union(*collectives.all_gather(set(pending)))
    places = [(prompt, answer) for prompt, answers in enumerate(responses) for answer in range(len(answers))]
    for prompt, answer in collectives.my_share([place for place in places if place not in early]):
        grade(prompt, answer, responses[prompt][answer])
    for _ in as_completed(pending.values()):
        heartbeat.beat()
    verdicts: dict[tuple[int, int], Verdict] = {}
    for graded in collectives.all_gather({place: future.result() for place, future in pending.items()}):
        verdicts |= graded
    return [[(response, verdicts[i, j]) for j, response in enumerate(row)] for i, row in enumerate(responses)]


def _deduplicated(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts with distinct ids: seeds derive from ids, and equal seeds would give equal answers."""
    counts: Counter[str] = Counter()
    result = []
    for prompt in prompts:
        again = counts[prompt.prompt_id]
        counts[prompt.prompt_id] += 1
        result.append(replace(prompt, prompt_id=f"{prompt.prompt_id} again {again}") if again else prompt)
    return result


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% score interval of a share seen in ``count`` trials (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    z2 = _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(verdicts: Sequence[Sequence[Verdict]]) -> Accuracy:
    """avg@k: the mean over prompts of their answers' mean reward.

    An answer without a verdict has earned nothing that is known: it counts as 0 in the value, and as 1 in the upper
    end of the interval. More than 1% of them is logged as a warning.

    The interval is Wilson's with one trial per prompt. Averaging k answers only narrows the true
    one, so for k > 1 it is on the safe side.
    """
    rows = [row for row in verdicts if row]
    value, best = (
        _mean([_mean([missing if v.reward is None else v.reward for v in row]) for row in rows])
        for missing in (0.0, 1.0)
    )
    low, high = wilson_interval(value, len(rows))[0], wilson_interval(best, len(rows))[1]
    num_missing = sum(v.reward is None for row in rows for v in row)
    num_answers = sum(map(len, rows))
    if num_missing > MAX_MISSING * num_answers:
        _log.warning("evaluation: %d of %d answers have no verdict and count as wrong", num_missing, num_answers)
    return Accuracy(
        value=value, low=low, high=high, num_prompts=len(rows), num_missing=num_missing, num_answers=num_answers
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
