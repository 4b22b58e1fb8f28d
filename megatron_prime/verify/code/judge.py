"""Runs a program against its tests: what goes into the sandbox, what comes out, and who compares.

Expected outputs and results stay in this process. Assertions go to a sandbox of their own, beside the program's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prime.verify.code.compare import CHECKERS, same_values
from megatron_prime.verify.code.problem import AssertTests, CallTests, OutputTests, Problem
from megatron_prime.verify.code.sandbox import wire
from megatron_prime.verify.code.sandbox.child import Child, OutOfTime, Stopwatch, send_all
from megatron_prime.verify.code.sandbox.launch import Launcher
from megatron_prime.verify.code.scoring import NOT_RUN

MAX_TIME_LIMITS = 2
"""After so many tests out of time the others count as failed unseen."""
MAX_OUTPUT_BYTES = 2**20
"""Of standard output, beyond twice the length of what is expected."""
CALL_PRELUDE = "import collections, functools, heapq, itertools, math, string\n" + "".join(
    f"from {module} import *\n"
    for module in ("typing", "collections", "functools", "itertools", "math", "heapq", "bisect")
)
"""Function-style problems are written for graders that have these names defined (APPS, LeetCode)."""
_RESULT_TAGS = ("int", "list", "tuple", "dict")
"""What may be equal to a JSON value. Nothing else a program sends is built in this process, which no limit holds."""
_PROGRAM, _TESTS = 0, 1
"""Slots: each has its own user where there are users to spare."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program."""

    test_seconds: float
    """CPU time of a test; it may last twice as long by the clock on the wall."""
    total_seconds: float
    """Wall-clock time of all tests together."""


class _Failed(Exception):
    """The program cannot go on; carries the status."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class Statuses(list[str]):
    """The status of every test, in order."""

    reason: str = ""
    """What is wrong with the tests, where something is."""


def judge(
    launcher: Launcher, limits: Limits, problem: Problem, code: str, *, stop_at_failure: bool = False
) -> Statuses:
    """The status of every test, in order.

    Args:
        launcher: starts sandboxed processes.
        limits: of the program.
        problem: the tests.
        code: the program.
        stop_at_failure: leave the tests after the first failure as ``not_run``.

    Raises:
        SandboxError: the launcher is broken.
    """
    run = _Run(launcher, limits, stop_at_failure, len(problem))
    if isinstance(problem, OutputTests):
        run.output_tests(problem, code)
    elif isinstance(problem, CallTests):
        run.call_tests(problem, code)
    else:
        run.assert_tests(problem, code)
    statuses = Statuses([*run.statuses, *[NOT_RUN] * (len(problem) - len(run.statuses))])
    statuses.reason = run.reason
    return statuses


class _Run:
    def __init__(self, launcher: Launcher, limits: Limits, stop_at_failure: bool, num_tests: int) -> None:
        self.statuses: list[str] = []
        self.reason = ""
        self._launcher = launcher
        self._limits = limits
        self._stop_at_failure = stop_at_failure
        self._num_tests = num_tests
        self._deadline = time.monotonic() + limits.total_seconds

    def _goes_on(self) -> bool:
        """Whether there is a next test to run."""
        if len(self.statuses) == self._num_tests or time.monotonic() >= self._deadline:
            return False
        if self._stop_at_failure and self.statuses and self.statuses[-1] != "pass":
            return False
        # A program that does not compile, or tests that are broken, will not mend.
        hopeless = self.statuses and self.statuses[-1] in ("compile_error", "bad_tests")
        return not hopeless and self.statuses.count("time_limit") < MAX_TIME_LIMITS

    def _stopwatch(self, *children: Child) -> Stopwatch:
        return Stopwatch(children, self._limits.test_seconds, self._deadline)

    # Standard input and output

    def output_tests(self, problem: OutputTests, code: str) -> None:
        """One process per test."""
        while self._goes_on():
            text, expected = problem.inputs[len(self.statuses)], problem.outputs[len(self.statuses)]
            try:
                output = self._output(code, text, MAX_OUTPUT_BYTES + 2 * len(expected))
                self.statuses.append(self._check(problem, text, output, expected))
            except _Failed as failure:
                self.statuses.append(failure.status)

    def _check(self, problem: OutputTests, text: str, output: str, expected: str) -> str:
        if not problem.checker_code:
            return "pass" if CHECKERS[problem.checker](expected, output) else "wrong_answer"
        status = self._ask_checker(problem.checker_code, text, output, expected)
        if status != "failed":
            return status
        # A checker may read nothing but what is right: it is at fault only where it fails at that too.
        status = self._ask_checker(problem.checker_code, text, expected, expected)
        if status == "failed" and time.monotonic() >= self._deadline:
            return "time_limit"
        verdict = {"pass": "wrong_answer", "harness_error": "harness_error"}.get(status, "bad_tests")
        if verdict == "bad_tests":
            self.reason = "the checker does not accept the expected output either"
        return verdict

    def _ask_checker(self, code: str, text: str, output: str, expected: str) -> str:
        """What a checker says of an output; ``failed`` where it says nothing."""
        # It is code of the data set: it gets a sandbox too, and the program is gone by now.
        checker = AssertTests(["assert check(input, output, expected)"], setup=code)
        variables = {"input": text, "output": output, "expected": expected}
        try:
            with self._child("test", _TESTS) as tester:
                (status,) = self._results(tester, checker, 0, variables, None)
        except _Failed as failure:
            status = failure.status
        except OutOfTime:
            status = "failed"
        return status if status in ("pass", "wrong_answer", "harness_error") else "failed"

    def _output(self, code: str, text: str, max_bytes: int) -> str:
        """What the program prints for an input."""
        reader, writer = os.pipe()
        try:
            with _memory_file(text.encode(errors="surrogateescape")) as stdin:
                child = self._child("script", _PROGRAM, stdin=stdin, stdout=writer)
            os.close(writer)
            with child:
                output = self._read(child, reader, code, max_bytes)
                status = child.explain()
        except OutOfTime:
            raise _Failed("time_limit") from None
        finally:
            os.close(reader)
        if status != "pass":
            raise _Failed(status)
        return output.decode(errors="replace")

    def _read(self, child: Child, reader: int, code: str, max_bytes: int) -> bytes:
        os.set_blocking(reader, False)
        watch = self._stopwatch(child)
        with contextlib.suppress(wire.WireError):
            child.request({"code": code}, watch.wall_seconds)
        output = bytearray()
        open_descriptors = {reader, child.end_descriptor}
        while open_descriptors:
            ready = watch.wait(*open_descriptors)
            if child.end_descriptor in ready:
                open_descriptors.clear()
            with contextlib.suppress(BlockingIOError):
                while data := os.read(reader, 2**18):
                    output += data
                    if len(output) > max_bytes:
                        raise _Failed("output_limit")
                # All writers are gone, though the process itself may stay.
                open_descriptors.discard(reader)
        return bytes(output)

    # Calls

    def call_tests(self, problem: CallTests, code: str) -> None:
        """One process for all calls, replaced when it has died or hangs."""
        while self._goes_on():
            ours, theirs = socket.socketpair()
            try:
                with ours, self._serving(code, CALL_PRELUDE, theirs) as child:
                    while self._goes_on():
                        self.statuses.append(self._call(child, ours, problem, len(self.statuses)))
            except _Failed as failure:
                self.statuses.append(failure.status)
            except OutOfTime:
                self.statuses.append("time_limit")

    def _call(self, child: Child, channel: socket.socket, problem: CallTests, number: int) -> str:
        nonce = secrets.token_hex(8)
        arguments = [wire.encode(value) for value in problem.arguments[number]]
        message = {"nonce": nonce, "op": "call", "name": problem.fn_name, "args": arguments, "kwargs": {}}
        watch = self._stopwatch(child)
        try:
            send_all(channel, message, watch.wall_seconds)
            reply = _receive(channel, child, watch, _max_reply_bytes(problem, number))
        except wire.TooLong:
            raise _Failed("output_limit") from None
        except wire.WireError:
            status = child.explain()
            raise _Failed("runtime_error" if status == "pass" else status) from None
        if not isinstance(reply, dict) or reply.get("nonce") != nonce:
            raise _Failed("wrong_answer")
        if "error" in reply:
            return "memory_limit" if reply["error"] == "MemoryError" else "runtime_error"
        return "pass" if _is_result(problem.results[number], reply.get("value")) else "wrong_answer"

    @contextlib.contextmanager
    def _serving(self, code: str, prefix: str, calls: socket.socket) -> Iterator[Child]:
        """A process with the program's functions defined; takes over the socket to it."""
        with calls:
            child = self._child("serve", _PROGRAM, calls=calls.fileno())
        with child:
            watch = self._stopwatch(child)
            with contextlib.suppress(wire.WireError):
                child.request({"code": code, "prefix": prefix}, watch.wall_seconds)
            while not any(event.get("event") == "ready" for event in child.take_events()):
                if child.end_descriptor in watch.wait(child.events_descriptor, child.end_descriptor):
                    status = child.explain()
                    raise _Failed("runtime_error" if status == "pass" else status)
            yield child

    # Assertions

    def assert_tests(self, problem: AssertTests, code: str) -> None:
        """Two processes, the program's and the tests', replaced when a test hangs."""
        while self._goes_on():
            ours, theirs = socket.socketpair()
            try:
                with ours, self._serving(code, problem.prefix, theirs) as program:
                    tester = self._child("test", _TESTS, calls=ours.fileno())
                    # From here on only the two of them talk.
                    ours.close()
                    with tester:
                        for status in self._results(tester, problem, len(self.statuses), {}, program):
                            self.statuses.append(status)
                            if not self._goes_on():
                                break
            except _Failed as failure:
                self.statuses.append(failure.status)
            except OutOfTime:
                self.statuses.append("time_limit")

    def _results(
        self, tester: Child, problem: AssertTests, first: int, variables: dict[str, str], program: Child | None
    ) -> Iterator[str]:
        """The statuses of the tests from `first` on, as they come."""
        nonce = secrets.token_hex(8)
        children = [tester] if program is None else [tester, program]
        watch = self._stopwatch(*children)
        pieces = list(enumerate(problem.pieces))[first:]
        request = {"setup": problem.setup, "tests": pieces, "entry_point": problem.entry_point, "nonce": nonce}
        request["prefix"] = problem.prefix
        try:
            tester.request({**request, "variables": variables}, watch.wall_seconds)
        except wire.WireError:
            # Too long, unless nobody is there to read it.
            self.reason = "they are too long"
            raise _Failed("harness_error" if tester.explain() == "harness_error" else "bad_tests") from None
        num_results = 0
        while num_results < len(pieces):
            ready = watch.wait(tester.events_descriptor, tester.end_descriptor)
            for event in tester.take_events():
                if event.get("nonce") != nonce:
                    continue
                if event["event"] == "started":
                    watch = self._stopwatch(*children)
                    continue
                num_results += 1
                status = _status_of(event, program)
                if status == "bad_tests":
                    self.reason = str(event.get("error"))
                yield status
            if tester.end_descriptor in ready and num_results < len(pieces):
                end = tester.explain()
                raise _Failed(end if end in ("memory_limit", "harness_error") else "runtime_error")

    def _child(self, role: str, slot: int, **descriptors: int) -> Child:
        # A process that answers many calls is held to each call's time by its judge.
        limit = self._limits.test_seconds if role == "script" else self._limits.total_seconds
        return Child(self._launcher, role, slot, limit, **descriptors)


def _status_of(event: dict[str, Any], program: Child | None) -> str:
    """The status of a test from the tester's report."""
    if event["event"] == "bad_tests":
        return "bad_tests"
    status = str(event["status"])
    if status == "program_gone":
        end = "pass" if program is None else program.explain()
        return "runtime_error" if end == "pass" else end
    if status == "runtime_error" and event["error"] == "MemoryError":
        return "memory_limit"
    return status


def _max_reply_bytes(problem: CallTests, number: int) -> int:
    """What a right answer may take: a program cannot make its judge, which no limit holds, read 16 MiB instead."""
    told = len(json.dumps([problem.results[number], problem.arguments[number]]))
    return min(wire.MAX_MESSAGE_BYTES, MAX_OUTPUT_BYTES + 16 * told)


def _receive(channel: socket.socket, child: Child, watch: Stopwatch, max_bytes: int) -> Any:
    frames = wire.Frames(max_bytes)
    while True:
        watch.wait(channel.fileno())
        channel.settimeout(watch.wall_seconds)
        try:
            data = channel.recv(2**18)
        except OSError as error:
            # A reset, where the program has ended with our request unread.
            raise wire.WireError(f"the program is gone: {error}") from error
        if not data:
            raise wire.WireError("the program is gone")
        if messages := frames.feed(data):
            return messages[0]


def _is_result(expected: Sequence[Any], message: Any) -> bool:
    """Whether a result is one of the expected ones; data sets give it as it is or as the only item of a list."""
    try:
        value = wire.decode(message, only=_RESULT_TAGS)
        return any(
            same_values(wanted, value)
            or (isinstance(wanted, list) and len(wanted) == 1 and same_values(wanted[0], value))
            for wanted in expected
        )
    except (wire.WireError, RecursionError, ValueError):
        # Python writes no integer of more than 4300 digits, a key of a dictionary for instance.
        return False


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """A descriptor that reads some bytes and cannot write."""
    descriptor = os.memfd_create("stdin")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        readable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    finally:
        os.close(descriptor)
    try:
        yield readable
    finally:
        os.close(readable)
