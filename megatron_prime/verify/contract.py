"""Checks what a verifier of your own must do, from your tests and from `megatron-prime check`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.interfaces import Verifier
from megatron_prime.verify.plugin import make_own_verifier, problem_with

ODD_TEXTS = (
    "",
    " \n\t",
    "\0",
    "\ud800",
    "\\boxed{",
    "}" * 1000,
    "\\boxed" * 1000,
    "```python\n",
    "```" * 1000,
    "9" * 100_000,
    "\u202e\u200b\ufeff",
    "__import__('os').abort()",
)
"""What models write when they go astray. Each must get a verdict."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer with the reward that it must get."""

    response: str
    ground_truth: str
    reward: float | None
    ability: str = "math"
    data_source: str = ""

    @property
    def prompt(self) -> Prompt:
        """The question, of which a verifier sees the truth alone."""
        return Prompt(
            prompt_id="contract",
            text="",
            token_ids=(),
            ground_truth=self.ground_truth,
            ability=self.ability,
            data_source=self.data_source,
        )


def check_verifier(
    factory: str | Callable[[VerifierSection], Verifier],
    cases: Sequence[Case],
    *,
    section: VerifierSection | None = None,
    patience_seconds: float = 60.0,
) -> None:
    """Holds a verifier to what training relies on.

    It gives the cases their rewards, twice and in any order; a future of a `Verdict` for every text, with a reward from
    0 to 1 or None; and `close` can be called twice.

    Args:
        factory: what `verifier.factory` would name, or the function itself.
        cases: at least one that must be rewarded and one that must not.
        section: what the factory gets; by default that of an empty configuration.
        patience_seconds: how long all verdicts of one round may take.

    Raises:
        VerifierError: names everything that the verifier does wrong.
    """
    section = section or VerifierSection()
    verifier = make_own_verifier(replace(section, factory=factory)) if isinstance(factory, str) else factory(section)
    problems: list[str] = []
    if not any(case.reward for case in cases) or all(case.reward for case in cases):
        problems.append("cases: give at least one with a reward and one with none")
    answers = [(case.prompt, case.response) for case in cases]
    try:
        verdicts = _equal_verdicts(verifier, answers, patience_seconds, problems)
        odd = [(prompt, text) for prompt, _ in answers[:1] for text in ODD_TEXTS]
        _verdicts(verifier, odd, patience_seconds, problems)
    finally:
        verifier.close()
    verifier.close()
    for case, verdict in zip(cases, verdicts, strict=True):
        if verdict is not None and verdict.reward != case.reward:
            problems.append(
                f"{_named(case.response)}: reward {verdict.reward} ({verdict.status}), expected {case.reward}"
            )
    if problems:
        raise VerifierError("\n".join(dict.fromkeys(problems)))


def odd_answer_problems(verifier: Verifier, prompts: Sequence[Prompt], *, patience_seconds: float = 60.0) -> list[str]:
    """What a verifier does wrong with answers that are none, whatever rewards it gives them.

    Args:
        verifier: is closed, twice, at the end.
        prompts: questions that it knows how to judge.
        patience_seconds: how long all verdicts of one round may take; there are two.

    Returns:
        One line per problem; empty where every answer got a valid verdict, and the same one twice.
    """
    problems: list[str] = []
    try:
        answers = [(prompt, text) for prompt in prompts for text in ODD_TEXTS]
        _equal_verdicts(verifier, answers, patience_seconds, problems)
    finally:
        verifier.close()
    verifier.close()
    return list(dict.fromkeys(problems))


def _equal_verdicts(
    verifier: Verifier, answers: Sequence[tuple[Prompt, str]], patience_seconds: float, problems: list[str]
) -> list[Verdict | None]:
    """Verdicts of two rounds, the second backwards; None where one of the two is missing."""
    first = _verdicts(verifier, answers, patience_seconds, problems)
    second = _verdicts(verifier, answers[::-1], patience_seconds, problems)[::-1]
    for (_, text), one, other in zip(answers, first, second, strict=True):
        if one and other and (one.status, one.reward) != (other.status, other.reward):
            problems.append(f"{_named(text)}: once {one.status} ({one.reward}), once {other.status} ({other.reward})")
    return [one if one and other else None for one, other in zip(first, second, strict=True)]


def _verdicts(
    verifier: Verifier, answers: Sequence[tuple[Prompt, str]], patience_seconds: float, problems: list[str]
) -> list[Verdict | None]:
    """Side by side, as in training; None where there is no valid one."""
    pending: list[Future[Verdict] | None] = []
    for prompt, text in answers:
        response = Response(text=text, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
        try:
            future = verifier.submit(prompt, response)
        except Exception as error:
            problems.append(f"{_named(text)}: submit raised {type(error).__name__}: {error}")
            pending.append(None)
            continue
        if not isinstance(future, Future):
            problems.append(
                f"{_named(text)}: submit returned a {type(future).__name__}, not a concurrent.futures.Future"
            )
        pending.append(future if isinstance(future, Future) else None)
    end = time.monotonic() + patience_seconds
    return [
        None if future is None else _verdict(future, text, max(0.0, end - time.monotonic()), problems)
        for (_, text), future in zip(answers, pending, strict=True)
    ]


def _verdict(future: Future[Verdict], text: str, seconds: float, problems: list[str]) -> Verdict | None:
    try:
        verdict = future.result(timeout=seconds)
    except FutureTimeout:
        problems.append(f"{_named(text)}: no verdict in time")
        return None
    except Exception as error:
        problems.append(f"{_named(text)}: the future raised {type(error).__name__}: {error}")
        return None
    problem = problem_with(verdict)
    if problem is not None:
        problems.append(f"{_named(text)}: the verdict {problem}")
        return None
    return verdict


def _named(text: str) -> str:
    short = text if len(text) <= 40 else text[:40] + "..."
    return f"answer {short!r}"
