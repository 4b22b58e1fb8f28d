"""Forked ranks end as started programs do, whatever ends them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from megatron_prime.launch.forked import ForkedProcess
from megatron_prime.watch.exit_status import FAILED


def sleep() -> int:
    time.sleep(60)
    return 0


def divide() -> int:
    return 1 // 0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: 0, 0),
        (lambda: 75, 75),
        (divide, FAILED),
        (lambda: sys.exit(3), 3),
        (lambda: sys.exit("a word"), FAILED),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM),
    ],
)
def test_status(function: Callable[[], int], expected: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert ForkedProcess(function, {}).wait() == expected
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (function is divide)


def test_signals_reach_it_and_an_ended_process_ignores_them() -> None:
    process = ForkedProcess(sleep, {})
    assert process.poll() is None
    process.kill()
    assert process.wait() == process.poll() == -signal.SIGKILL
    process.kill()


def test_its_environment_is_its_own_and_what_it_prints_comes_once(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", end=" ")
    process = ForkedProcess(lambda: print(os.environ["OF_THE_FORK"]) or 0, {"OF_THE_FORK": "inside"})
    assert process.wait() == 0
    assert "OF_THE_FORK" not in os.environ
    assert capfd.readouterr().out == "before inside\n"
