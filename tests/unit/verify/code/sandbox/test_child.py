"""A sandboxed process as its judge sees it: what its end means, and the time that it is given."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from megatron_prime.verify.code.sandbox import child
from megatron_prime.verify.code.sandbox.child import Child, OutOfTime, Stopwatch
from megatron_prime.verify.code.sandbox.launch import SandboxError

FLOOD = "import os\nwhile True: os.write(3, b'x' * 65536)"


def run(launcher, code: str, *, cpu_seconds: float = 1.0, patience_seconds: float = 20.0) -> Child:
    """A program that has ended or is still at it when patience is over."""
    process = Child(launcher, "script", 0, cpu_seconds)
    process.request({"code": code}, patience_seconds)
    watch = Stopwatch([], 1000.0, time.monotonic() + patience_seconds)
    while process.end_descriptor not in watch.wait(process.end_descriptor, process.events_descriptor):
        process.take_events()
    return process


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print(1)", "pass"),
        ("raise SystemExit(3)", "runtime_error"),
        ("1/0", "runtime_error"),
        ("def", "compile_error"),
        ("raise MemoryError", "memory_limit"),
        ("x = bytearray(3 * 10**9)", "memory_limit"),
        ("while True: pass", "time_limit"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory_limit"),
        (FLOOD, "output_limit"),
    ],
)
def test_what_the_end_of_a_process_means(fork_server, code: str, status: str) -> None:
    with run(fork_server, code) as process:
        assert process.explain() == status
        assert process.explain() == status and process.cpu_seconds() is None


class Plain:
    """Starts a program of this machine in a role's place."""

    def __init__(self, *command: str) -> None:
        self.command = command

    def start(self, role: str, slot: int, cpu_seconds: int, descriptors: object) -> Plain:
        self.process = subprocess.Popen(self.command)
        self.handle = os.pidfd_open(self.process.pid)
        return self

    def fileno(self) -> int:
        return self.handle

    def cpu_seconds(self) -> None:
        return None

    def kill(self) -> None:
        self.process.kill()

    def reap(self) -> int:
        os.close(self.handle)
        return self.process.wait()


@pytest.mark.parametrize("command", [("true",), ("false",)])
def test_a_process_that_never_was_locked_in_has_run_nothing_whatever_its_status(command: tuple[str, ...]) -> None:
    with Child(Plain(*command), "script", 0, 1.0) as process:  # pyright: ignore[reportArgumentType]
        assert process.explain() == "harness_error"


def test_a_launcher_that_fails_leaves_nothing_open() -> None:
    class Refusing:
        def start(self, *arguments: object) -> None:
            raise SandboxError("the fork server is gone")

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(SandboxError):
            Child(Refusing(), "script", 0, 1.0)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_end_of_a_judge_is_the_end_of_its_processes(fork_server) -> None:
    with Child(fork_server, "script", 0, 5.0) as process:
        process.request({"code": "import time; time.sleep(1000)"}, 20.0)
    assert process.end() == -9


class Clock:
    """A process whose CPU time runs as it is told."""

    def __init__(self, *readings: float) -> None:
        self.readings = list(readings)

    def cpu_seconds(self) -> float:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def test_cpu_time_counts_from_the_start_of_the_watch() -> None:
    reading, writing = os.pipe()
    try:
        # Three seconds were used before, two more are used since.
        watch = Stopwatch([Clock(3.0, 3.5, 5.1)], 2.0, time.monotonic() + 100)
        with pytest.raises(OutOfTime):
            watch.wait(reading)
        os.write(writing, b"x")
        assert Stopwatch([Clock(3.0)], 2.0, time.monotonic() + 100).wait(reading) == {reading}
    finally:
        os.close(reading)
        os.close(writing)


def test_who_waits_instead_of_computing_has_a_limit_too(monkeypatch) -> None:
    monkeypatch.setattr(child, "WALL_PER_CPU", 2.0)
    reading, writing = os.pipe()
    try:
        begun = time.monotonic()
        with pytest.raises(OutOfTime):
            Stopwatch([Clock(0.0)], 0.1, begun + 100).wait(reading)
        assert 0.2 <= time.monotonic() - begun < 10
        with pytest.raises(OutOfTime):
            Stopwatch([Clock(0.0)], 100.0, time.monotonic() - 1).wait(reading)
    finally:
        os.close(reading)
        os.close(writing)
