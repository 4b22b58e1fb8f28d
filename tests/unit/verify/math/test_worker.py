"""The grader alone: verdicts with units, truths that cannot be read, and its loop of requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from megatron_prime.verify.math.compare import Rules
from megatron_prime.verify.math.worker import MAX_UNKNOWN_LENGTH, _status, grade

MIB = 2**20


@pytest.mark.parametrize(
    ("gold", "answer", "status"),
    [
        ("x+1", "1+x", "correct"),
        ("x+1", "x+2", "wrong"),
        ("5", "a lot of ???", "malformed"),
        ("5", "9^{9^{9^{9}}}", "wrong"),  # it is still to be worked out, whatever it is
        (r"5\text{ km}", r"5\text{ cm}", "wrong"),
        (r"5\text{ km}", "5", "correct"),
        (r"30^\circ", r"\frac{\pi}{6}", "correct"),
        (r"30^\circ", r"\frac{\pi}{3}", "wrong"),
        (r"\int_0^1 x \, dx", r"\int_0^1 x \, dx", "correct"),
        (r"\int_0^1 x \, dx", "1" + "+0" * 10 * MAX_UNKNOWN_LENGTH, "malformed"),
        (r"\int_0^1 x \, dx", r"\lim_{x \to 0} x", "malformed"),
        ("the sum of it all, ???", "5", "grader_error"),
    ],
)
def test_verdicts(gold: str, answer: str, status: str) -> None:
    assert grade(gold, answer) == status


def test_values_beyond_all_bounds_are_a_status_of_their_own() -> None:
    assert grade("5", "9^{9^{9^{9}}}", Rules(any_form=True)) == "resource"


def test_whatever_an_answer_raises_is_the_answers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gold: str, answer: str, rules: Rules) -> str:
        if answer == "bad" or gold == "bad":
            raise ZeroDivisionError
        if answer == "huge":
            raise MemoryError
        return "correct"

    monkeypatch.setattr("megatron_prime.verify.math.worker.grade", fail)
    assert _status("5", "bad", Rules()) == "malformed"
    assert _status("bad", "5", Rules()) == "grader_error"
    assert _status("5", "huge", Rules()) == "resource"


@pytest.fixture
def worker() -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
    """A started worker that has said that it is ready, with half a second for each request."""
    ours, theirs = Pipe()
    code = f"from megatron_prime.verify.math.worker import main; main({theirs.fileno()}, {2048 * MIB}, 0.5)"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
    theirs.close()
    assert ours.poll(60) and json.loads(ours.recv_bytes()) == "ready"
    yield ours, process
    process.kill()
    process.wait()


def ask(connection: Connection, *request: object) -> str:
    connection.send_bytes(json.dumps(request).encode())
    assert connection.poll(60)
    return json.loads(connection.recv_bytes())


def test_requests_are_answered_with_the_rules_that_come_with_them(worker) -> None:
    connection, process = worker
    assert ask(connection, "3.14", "3.145", None, False) == "wrong"
    assert ask(connection, "3.14", "3.145", 0.01, False) == "correct"
    assert ask(connection, "6", "2+4", None, False) == "wrong"
    assert ask(connection, "6", "2+4", None, True) == "correct"
    connection.close()
    assert process.wait(20) == 0


def test_a_request_that_takes_too_long_is_ended_and_the_next_one_is_answered(worker) -> None:
    connection, process = worker
    # The truth is left to sympy, which would work on it for ever.
    slow = r"\int_0^1 x^{x^{x^x}} \sin(x^x) dx"
    assert ask(connection, slow, slow, None, False) in ("timeout", "correct")
    assert ask(connection, "1", "1", None, False) == "correct"
    assert process.poll() is None and os.path.exists(f"/proc/{process.pid}")
