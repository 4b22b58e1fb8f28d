"""What a verifier of your own must do, as a check to call from a test of yours (docs/reference/verifiers.md)."""

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
    try:
        first = _verdicts(verifier, cases, patience_seconds, problems)
        second = _verdicts(verifier, cases[::-1], patience_seconds, problems)[::-1]
        odd = [replace(case, response=text) for case in cases[:1] for text in ODD_TEXTS]
        _verdicts(verifier, odd, patience_seconds, problems)
    finally:
        verifier.close()
    verifier.close()
    for case, one, other in zip(cases, first, second, strict=True):
        if one is None or other is None:
            continue
        if one.reward != case.reward:
            problems.append(f"{_named(case)}: reward {one.reward} ({one.status}), expected {case.reward}")
        if (one.status, one.reward) != (other.status, other.reward):
            problems.append(f"{_named(case)}: once {one.status} ({one.reward}), once {other.status} ({other.reward})")
    if problems:
        raise VerifierError("\n".join(dict.fromkeys(problems)))


def _verdicts(
    verifier: Verifier, cases: Sequence[Case], patience_seconds: float, problems: list[str]
) -> list[Verdict | None]:
    """Side by side, as in training; None where there is no valid one."""
    pending: list[Future[Verdict] | None] = []
    for case in cases:
        prompt = Prompt(
            prompt_id="contract",
            text="",
            token_ids=(),
            ground_truth=case.ground_truth,
            ability=case.ability,
            data_source=case.data_source,
        )
        response = Response(text=case.response, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
        try:
            future = verifier.submit(prompt, response)
        except Exception as error:
            problems.append(f"{_named(case)}: submit raised {type(error).__name__}: {error}")
            pending.append(None)
            continue
        if not isinstance(future, Future):
            problems.append(
                f"{_named(case)}: submit returned a {type(future).__name__}, not a concurrent.futures.Future"
            )
        pending.append(future if isinstance(future, Future) else None)
    end = time.monotonic() + patience_seconds
    return [
        None if future is None else _verdict(future, case, max(0.0, end - time.monotonic()), problems)
        for case, future in zip(cases, pending, strict=True)
    ]


def _verdict(future: Future[Verdict], case: Case, seconds: float, problems: list[str]) -> Verdict | None:
    try:
        verdict = future.result(timeout=seconds)
    except FutureTimeout:
        problems.append(f"{_named(case)}: no verdict in time")
        return None
    except Exception as error:
        problems.append(f"{_named(case)}: the future raised {type(error).__name__}: {error}")
        return None
    problem = problem_with(verdict)
    if problem is not None:
        problems.append(f"{_named(case)}: the verdict {problem}")
        return None
    return verdict


def _named(case: Case) -> str:
    text = case.response if len(case.response) <= 40 else case.response[:40] + "..."
    return f"answer {text!r}"
