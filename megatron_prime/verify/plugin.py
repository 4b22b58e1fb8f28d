"""A user's own verifier: how it is found; and what no verifier may do to a run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.interfaces import Verifier
from megatron_prime.verify.futures import known

_log = logging.getLogger(__name__)


def find_factory(section: VerifierSection) -> Callable[[VerifierSection], Any]:
    """What ``verifier.factory`` names; it is imported and not called.

    Raises:
        VerifierError: it cannot be imported or called.
    """
    module_name, colon, function_name = str(section.factory).partition(":")
    if not colon:
        raise VerifierError(f"verifier.factory: {section.factory!r} must be package.module:function")
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise VerifierError(
            f"verifier.factory: {section.factory!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(factory):
        raise VerifierError(f"verifier.factory: {section.factory!r} is a {type(factory).__name__}, not a function")
    return factory


def make_own_verifier(section: VerifierSection) -> Verifier:
    """What ``verifier.factory`` makes.

    Raises:
        VerifierError: it cannot be imported or called, or makes no verifier.
    """
    verifier = find_factory(section)(section)
    missing = [name for name in ("submit", "close") if not callable(getattr(verifier, name, None))]
    if missing:
        raise VerifierError(f"verifier.factory: what {section.factory} returned has no {' and no '.join(missing)}")
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
