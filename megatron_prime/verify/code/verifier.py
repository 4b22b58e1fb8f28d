"""Outcome labels of code responses."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import Future
from typing import Any

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import CodeVerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.code.extract import MAX_CODE_CHARS, extract_code
from megatron_prime.verify.code.sandbox.launch import environment, python_command
from megatron_prime.verify.code.scoring import UNCERTAIN
from megatron_prime.verify.futures import known, mapped
from megatron_prime.verify.pool import Outcome, WorkerKind, WorkerPool

KIND = "code"
VERSION = 3
"""Counts up with every change after which a program may be judged differently."""
ISOLATIONS = ("fork_server", "bubblewrap")
"""The safe ones, the best first."""
_MARGIN_SECONDS = 5.0
"""What a worker may take beyond the limit of its program, before it is taken for stuck."""
_log = logging.getLogger(__name__)


def code_worker_kind(section: CodeVerifierSection, isolation: str) -> WorkerKind:
    """Workers that run programs against tests.

    Args:
        section: the configuration.
        isolation: how.
    """
    settings = json.dumps(
        {
            "isolation": isolation,
            "memory_bytes": int(section.memory_gib * 2**30),
            "test_seconds": section.test_seconds,
            "total_seconds": section.total_seconds,
        }
    )
    return WorkerKind(
        name=KIND,
        command=lambda fd: python_command("megatron_prime.verify.code.worker", str(fd), settings),
        version=f"{VERSION} {settings}",
        advice="see docs/reference/verifiers.md for what a machine must allow",
        cacheable=lambda reply: reply["status"] not in UNCERTAIN,
        environment=environment(),
    )


def choose_isolation(section: CodeVerifierSection) -> str:
    """The isolation asked for, or the best one that this machine offers; tried out, not guessed.

    Raises:
        VerifierError: there is none; says what each one lacked.
    """
    if section.isolation == "rlimits_unsafe":
        _log.warning("programs run WITHOUT ISOLATION (verifier.code.isolation: rlimits_unsafe): they see this machine")
    candidates = ISOLATIONS if section.isolation == "auto" else (section.isolation,)
    problems: list[str] = []
    for isolation in candidates:
        pool = WorkerPool([code_worker_kind(section, isolation)], num_workers=1, cache_size=0)
        try:
            pool.submit(KIND, _PROBE, section.total_seconds + _MARGIN_SECONDS).result()
        except VerifierError as error:
            problems.append(f"{isolation}: {error}")
            continue
        finally:
            pool.close()
        _log.info("programs run in isolation '%s'%s", isolation, _lacking(problems))
        return isolation
    raise VerifierError(
        "this machine offers no safe way to run programs (user "
        f"{os.geteuid()}):\n" + "\n".join(problems) + "\nallow user namespaces (in a container: run it with "
        "--cap-add SYS_ADMIN and --security-opt seccomp=unconfined), or take code prompts out of data.abilities; "
        "verifier.code.isolation: rlimits_unsafe runs programs that can read and write what this user can"
    )


_PROBE = {"ground_truth": '{"inputs": [""], "outputs": ["1"]}', "code": "print(1)", "mode": "all_or_nothing"}


def _lacking(problems: list[str]) -> str:
    return f"; not available: {'; '.join(problems)}" if problems else ""


class CodeVerifier:
    """Runs the program of each response against its problem's tests (`protocol.Verifier`).

    Args:
        pool: with workers of `code_worker_kind`.
        section: the configuration.
    """

    def __init__(self, pool: WorkerPool, section: CodeVerifierSection) -> None:
        self._pool = pool
        self._mode = section.mode
        self._limit_seconds = section.total_seconds + _MARGIN_SECONDS

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """See `protocol.Verifier.submit`."""
        code = extract_code(response.text)
        if code is None or len(code) > MAX_CODE_CHARS:
            return known(Verdict(status="no_code", reward=0.0))
        request = {"ground_truth": prompt.ground_truth, "code": code, "mode": self._mode}
        outcome = self._pool.submit(KIND, request, self._limit_seconds)
        return mapped(outcome, lambda outcome: _verdict(outcome, code))

    def close(self) -> None:
        """The pool belongs to whoever made it."""


def _verdict(outcome: Outcome, code: str) -> Verdict:
    reply: dict[str, Any] = outcome.reply if outcome.end == "answered" else {"status": "harness_error", "reward": None}
    return Verdict(
        status=reply["status"],
        reward=reply["reward"],
        extracted=code,
        seconds=outcome.seconds,
        reason=reply.get("detail") or "",
    )
