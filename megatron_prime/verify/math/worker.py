"""The grader process: compares two answers by their values, one request at a time.

Started by `pool` without the trainer (no torch), so that it is ready in about a second. Its arguments: the file
descriptor of its pipe, its limit of address space in bytes, its limit per request in seconds. Requests are JSON
``[gold, answer, tolerance, any form]``, replies a JSON string.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import re
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from megatron_prime.verify.math.compare import STRICT, Rules, same
from megatron_prime.verify.math.evaluate import TooLarge, Undefined, equal
from megatron_prime.verify.math.expression import Node
from megatron_prime.verify.math.normalize import Answer, normalize
from megatron_prime.verify.math.structure import Value, read
from megatron_prime.verify.math.tokens import Unreadable

_PR_SET_PDEATHSIG = 1
_COMMAND = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]{2,}")
_PLAIN_COMMANDS = r"""
\left \right \frac \sqrt \pi \infty \cup \cap \setminus \in \le \ge \ne \pm \cdot \times \mathbb \quad \text and or
"""
_HARMLESS = frozenset(_PLAIN_COMMANDS.split())
"""Commands that do nothing but combine values."""


def grade(gold: str, answer: str, rules: Rules = STRICT) -> str:
    """Compares two answers by their values.

    Args:
        gold: ground truth, LaTeX or plain text.
        answer: the model's answer, the same.
        rules: what is allowed beside equality.

    Returns:
        ``correct``, ``wrong``, ``malformed`` (the answer is not mathematics alone), ``resource`` (its values
        are beyond all bounds) or ``grader_error`` (the ground truth cannot be read).
    """
    truth, given = normalize(gold), normalize(answer)
    try:
        wanted = read(truth.body)
        # What cannot be compared with itself can be compared with nothing.
        same(wanted, wanted, rules)
    except (Unreadable, RecursionError, TooLarge):
        return _grade_by_math_verify(gold, answer)
    try:
        found = read(given.body)
        return "correct" if _units_fit(truth, given, wanted, found, rules) else "wrong"
    except (Unreadable, RecursionError):
        return "malformed"
    except TooLarge:
        return "resource"


def _units_fit(truth: Answer, given: Answer, wanted: Value, found: Value, rules: Rules) -> bool:
    """Compares, with degrees on one side turned into radians where the numbers differ."""
    if truth.unit and given.unit and truth.unit != given.unit:
        return False
    if same(wanted, found, rules):
        return True
    if {truth.unit, given.unit} != {"°", ""} or wanted.node is None or found.node is None:
        return False
    nodes = [Node("degree", (v.node,)) if a.unit else v.node for a, v in ((truth, wanted), (given, found)) if v.node]
    try:
        return same(Value("formula", node=found.node), found, rules) and equal(nodes[0], nodes[1])
    except Undefined:
        return False


def _grade_by_math_verify(gold: str, answer: str) -> str:
    """For truths of kinds that `structure` does not know. The answer may use what the truth uses, and nothing else."""
    from math_verify import verify

    truth = _parse_truth(gold)
    if not truth:
        return "grader_error"
    unlike = not set(_COMMAND.findall(answer)) <= {*_COMMAND.findall(gold), *_HARMLESS}
    if unlike or "..." in answer or len(answer) > MAX_UNKNOWN_LENGTH * len(gold):
        return "malformed"
    given = _parse(answer)
    if not given:
        return "malformed"
    # Without math-verify's own timeouts: they would take over SIGALRM, and the pool kills what is too slow.
    return "correct" if verify(truth, given, timeout_seconds=None, allow_set_relation_comp=True) else "wrong"


MAX_UNKNOWN_LENGTH = 3
"""An answer that is so many times longer than a truth that only math-verify reads is not evaluated."""


@lru_cache(maxsize=256)
def _parse_truth(gold: str) -> list[Any]:
    """The truth; empty where it cannot even be compared with itself."""
    from math_verify import verify

    truth = _parse(gold)
    return truth if truth and verify(truth, _parse(gold), timeout_seconds=None, allow_set_relation_comp=True) else []


def _parse(latex: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: the plain-expression extractor hands text to sympy's parse_expr, which evaluates Python.
    config = [LatexExtractionConfig()]
    inner = latex.replace(r"\$", "").replace("$", "")
    return parse(f"${inner}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def main(descriptor: int, memory_bytes: int, timeout_seconds: float) -> None:
    """Answers requests until the pipe closes, that is until the parent closes it or dies.

    A fork of this process does the work. Where a request takes too long the kernel ends the fork, and the next one
    starts with everything imported.

    Args:
        descriptor: inherited end of the pipe.
        memory_bytes: limit of the address space.
        timeout_seconds: wall-clock limit of a request.
    """
    connection = Connection(descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    try:
        grade("x+1", "1+x")
        _grade_by_math_verify("x", "x")
    except (ImportError, MemoryError) as error:
        _reply(connection, f"{type(error).__name__}: {error}")
        return
    gc.freeze()
    _reply(connection, "ready")
    while (pid := os.fork()) != 0:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGALRM:
            # The pipe is closed, or the parent learns from the end of this process that the fork has died.
            sys.exit(abs(status))
        _reply(connection, "timeout")
    _serve(connection, timeout_seconds)
    os._exit(0)


def _serve(connection: Connection, timeout_seconds: float) -> None:
    # Should the first process be killed alone, nobody would answer for this one's end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        try:
            gold, answer, tolerance, any_form = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # The default action of SIGALRM ends the process from inside the kernel: no Python code has to run.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        status = _status(gold, answer, Rules(None if tolerance is None else Fraction(tolerance), any_form))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(connection, status)


def _status(gold: str, answer: str, rules: Rules) -> str:
    """What `grade` says; where it fails, the answer's fault unless the truth alone makes it fail too."""
    try:
        return grade(gold, answer, rules)
    except MemoryError:
        return "resource"
    except Exception:
        # Whatever sympy raises on the answers of a model is a case for `malformed`, not the end of the worker.
        try:
            return "malformed" if grade(gold, gold, rules) == "correct" else "grader_error"
        except Exception:
            return "grader_error"


def _reply(connection: Connection, message: str) -> None:
    connection.send_bytes(json.dumps(message).encode())
