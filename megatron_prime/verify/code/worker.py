"""A worker process of the pool that judges programs: outside the sandbox, with the tests, without the trainer.

Started with nothing but the standard library imported. Its arguments: the descriptor of its pipe, and its settings
as JSON. It says "ready" or what is missing, then answers requests one by one.
"""

from __future__ import annotations

import json
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megatron_prime.verify.code.judge import Limits, judge
from megatron_prime.verify.code.problem import OutputTests, ProblemError, parse_problem
from megatron_prime.verify.code.sandbox.bubblewrap import Bubblewrap
from megatron_prime.verify.code.sandbox.launch import ForkServer, Launcher, SandboxError
from megatron_prime.verify.code.scoring import num_tests_to_run, score

ORPHAN_MARGIN_SECONDS = 10.0
"""A worker whose parent died ends itself this much after the limit of its program."""
_FORBIDDEN = (
    "open('/etc/passwd')",
    "__import__('os').fork()",
    "__import__('socket').socket()",
    "__import__('os').execv('/bin/true', ['true'])",
    "open('/usr/created', 'w')",
)


def main() -> None:
    """Answers requests until the pipe closes, that is until the parent closes it or dies."""
    connection = Connection(int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    limits = Limits(settings["test_seconds"], settings["total_seconds"])
    try:
        launcher = make_launcher(settings["isolation"], settings["memory_bytes"])
    except (SandboxError, OSError, KeyError) as error:
        connection.send_bytes(json.dumps(str(error)).encode())
        return
    connection.send_bytes(json.dumps("ready").encode())
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            launcher.close()
            return
        # The default action of SIGALRM ends the process from inside the kernel: no Python code has to run.
        signal.setitimer(signal.ITIMER_REAL, limits.total_seconds + ORPHAN_MARGIN_SECONDS)
        try:
            reply = _answer(launcher, limits, request)
        except SandboxError as error:
            launcher.close()
            reply = {"status": "harness_error", "reward": None, "detail": str(error)}
            launcher = make_launcher(settings["isolation"], settings["memory_bytes"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(reply).encode())


def make_launcher(isolation: str, memory_bytes: int) -> Launcher:
    """A launcher that has proved itself on this machine.

    Args:
        isolation: ``fork_server``, ``bubblewrap`` or ``rlimits_unsafe``.
        memory_bytes: address space of a program.

    Raises:
        SandboxError: the machine does not offer it, or something forbidden was possible.
    """
    if isolation == "bubblewrap":
        launcher: Launcher = Bubblewrap(memory_bytes)
    else:
        launcher = ForkServer(isolation == "fork_server", memory_bytes)
    try:
        _prove(launcher, [] if isolation == "rlimits_unsafe" else _FORBIDDEN)
    except SandboxError:
        launcher.close()
        raise
    return launcher


def _prove(launcher: Launcher, forbidden: tuple[str, ...] | list[str]) -> None:
    limits = Limits(test_seconds=10.0, total_seconds=20.0)
    attempts = "".join(f"try:\n  {attempt}\n  print({attempt!r})\nexcept OSError:\n  pass\n" for attempt in forbidden)
    status = judge(launcher, limits, OutputTests(["41"], ["42"]), f"print(int(input()) + 1)\n{attempts}")[0]
    if status == "wrong_answer":
        raise SandboxError("a test program could do what it must not")
    if status != "pass":
        raise SandboxError(f"a test program did not run ({status})")


def _answer(launcher: Launcher, limits: Limits, request: dict[str, Any]) -> dict[str, Any]:
    try:
        problem = parse_problem(request["ground_truth"])
    except ProblemError as error:
        return {"status": "bad_tests", "reward": None, "detail": str(error)}
    mode = request["mode"]
    problem = problem.first(num_tests_to_run(len(problem), mode))
    statuses = judge(launcher, limits, problem, request["code"], stop_at_failure=mode == "all_or_nothing")
    status, reward = score(statuses, mode)
    return {"status": status, "reward": reward, "tests": statuses, "detail": statuses.reason}
