"""The grader process: compares two answers with math-verify, one request at a time.

Started by `pool` as a plain script with nothing of this package (and no torch) imported, so that it is ready
in about a second. Its arguments: the file descriptor of its pipe, its limit of address space in bytes, its limit
per request in seconds. Requests are JSON ``[gold, answer]``, replies a JSON string.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

RELATIVE_TOLERANCE = 1e-6
"""Two numbers that math-verify calls equal must also agree to this; it compares absolute differences, to which
1/2^98 and 1/2^99 are the same."""

_PR_SET_PDEATHSIG = 1


def grade(gold: str, answer: str) -> str:
    """Compares two answers symbolically.

    Args:
        gold: ground truth, LaTeX.
        answer: the model's answer, the same.

    Returns:
        ``correct``, ``wrong``, ``malformed`` (the answer is no mathematics) or ``grader_error``.
    """
    from math_verify import verify

    truth = _parse(gold)
    if not truth:
        return "grader_error"
    given = _parse(answer)
    if not given:
        return "malformed"
    # Without math-verify's own timeouts: they would take over SIGALRM, and the pool kills what is too slow.
    equal = verify(truth, given, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True)
    return "correct" if equal and _numbers_agree(truth[0], given[0]) else "wrong"


def _parse(latex: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: the plain-expression extractor hands text to sympy's parse_expr, which evaluates Python.
    config = [LatexExtractionConfig()]
    inner = latex.replace(r"\$", "").replace("$", "")
    return parse(f"${inner}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _numbers_agree(truth: Any, given: Any) -> bool:
    if not (getattr(truth, "is_number", False) and getattr(given, "is_number", False)):
        return True
    difference, size = abs((truth - given).evalf(30)), abs(truth.evalf(30))
    return bool(difference <= RELATIVE_TOLERANCE * size)


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
            gold, answer = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # The default action of SIGALRM ends the process from inside the kernel: no Python code has to run.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        try:
            status = grade(gold, answer)
        except MemoryError:
            status = "resource"
        except Exception:
            # Whatever sympy raises on the answers of a model is a case without a verdict, not the end of the worker.
            status = "grader_error"
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(connection, status)


def _reply(connection: Connection, message: str) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
