"""A user's own verifier: how it is made; and what no verifier may do to a run."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any, cast

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.interfaces import Verifier
from megatron_prime.sockets import resolve
from megatron_prime.verify.futures import known

_log = logging.getLogger(__name__)


def make_own_verifier(section: VerifierSection) -> Verifier:
    """What ``verifier.factory`` makes.

    Raises:
        ConfigError: the name cannot be resolved.
        VerifierError: it makes no verifier. What it raises itself comes through, with its traceback.
    """
    name = str(section.factory)
    verifier = resolve("verifier.factory", name)(section)
    missing = [method for method in ("submit", "close") if not callable(getattr(verifier, method, None))]
    if missing:
        raise VerifierError(f"verifier.factory: what {name} returned has no {' and no '.join(missing)}")
    return cast(Verifier, verifier)


def problem_with(verdict: Any) -> str | None:
    """What is wrong with something that should be a verdict; None where nothing is."""
    if not isinstance(verdict, Verdict):
        return f"is a {type(verdict).__name__}, not a Verdict"
    if not isinstance(verdict.status, str) or not verdict.status:
        return f"has status {verdict.status!r}; it must be a word"
    if verdict.reward is None:
        return None
    if not isinstance(verdict.reward, int | float) or not 0 <= verdict.reward <= 1:
        return f"has reward {verdict.reward!r}; it must be a number from 0 to 1, or None"
    return None


class GuardedVerifier:
    """Turns the errors of a verifier, and what is no verdict, into missing verdicts (`interfaces.Verifier`).

    Args:
        verifier: any.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """See `interfaces.Verifier.submit`; only a VerifierError comes through."""
        try:
            future = self._verifier.submit(prompt, response)
        except VerifierError:
            raise
        except Exception as error:
            return known(_missing(prompt, f"raised {type(error).__name__}: {error}"))
        guarded: Future[Verdict] = Future()
        future.add_done_callback(lambda done: _settle(guarded, prompt, done))
        return guarded

    def close(self) -> None:
        """Ends the verifier."""
        self._verifier.close()


def _settle(guarded: Future[Verdict], prompt: Prompt, done: Future[Any]) -> None:
    try:
        verdict = done.result()
    except VerifierError as error:
        guarded.set_exception(error)
        return
    except Exception as error:
        guarded.set_result(_missing(prompt, f"raised {type(error).__name__}: {error}"))
        return
    problem = problem_with(verdict)
    guarded.set_result(verdict if problem is None else _missing(prompt, f"gave a verdict that {problem}"))


def _missing(prompt: Prompt, what: str) -> Verdict:
    _log.warning("the verifier %s (prompt %s)", what, prompt.prompt_id)
    return Verdict(status="grader_error", reward=None)
