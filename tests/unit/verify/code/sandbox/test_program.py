"""The inside of the sandbox without its walls: what each role does with a request, and what it says of it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_prime.verify.code.sandbox import wire

CODE = (
    "import sys; from megatron_prime.verify.code.sandbox.program import run, take_descriptors; "
    "take_descriptors([0, 1, int(sys.argv[1]), int(sys.argv[2])]); run(sys.argv[3])"
)


class Running:
    """A process in a role, its two channels on this side."""

    def __init__(self, role: str) -> None:
        self.control, control = socket.socketpair()
        self.calls, calls = socket.socketpair()
        numbers = (control.fileno(), calls.fileno())
        command = [sys.executable, "-c", CODE, *map(str, numbers), role]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, pass_fds=numbers, **pipes)
        control.close()
        calls.close()
        for channel in (self.control, self.calls):
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 30, 0))
        assert self.control.recv(1) == wire.LOCKED_IN

    def request(self, **message: Any) -> None:
        self.control.sendall(wire.frame(message))

    def events(self) -> list[dict[str, Any]]:
        """All that it says until it ends."""
        said = b""
        while data := self.control.recv(2**16):
            said += data
        return list(wire.Frames().feed(said))

    def call(self, **message: Any) -> dict[str, Any]:
        call = {"nonce": 7, "op": "call", "args": [], "kwargs": {}} | message
        self.calls.sendall(wire.frame(call | {"args": [wire.encode(value) for value in call["args"]]}))
        reply = wire.receive(self.calls.fileno())
        assert reply.pop("nonce") == 7
        return reply

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.control.close()
        self.calls.close()


@pytest.fixture
def started() -> Iterator[list[Running]]:
    running: list[Running] = []
    yield running
    for process in running:
        process.end()


def script(started: list[Running], code: str, text: str = "") -> tuple[str, list[dict[str, Any]], int]:
    """Standard output, events and exit status of a program."""
    running = Running("script")
    started.append(running)
    running.request(code=code)
    output, _ = running.process.communicate(text.encode(), timeout=30)
    return output.decode(), running.events(), running.process.returncode


def test_a_script_is_the_main_module_on_standard_input_and_output(started) -> None:
    code = "import sys\nprint(__name__, sys.argv, __file__, input())\nprint(quit is exit, file=sys.stderr)"
    assert script(started, code, "5\n") == ("__main__ ['program.py'] /tmp/program.py 5\n", [], 0)


@pytest.mark.parametrize(
    ("code", "events", "status"),
    [
        ("def", [{"event": "compile_error", "error": "SyntaxError"}], 1),
        ("1/0", [{"event": "exception", "error": "ZeroDivisionError"}], 1),
        ("raise SystemExit", [], 0),
        ("raise SystemExit(3)", [], 3),
        ("raise SystemExit('no')", [], 1),
        ("import atexit; atexit.register(print, 'bye', flush=True)", [], 0),
        ("import threading; threading.Thread(target=lambda: print('late')).start()", [], 0),
    ],
)
def test_how_a_script_ends_is_said(started, code: str, events: list[dict[str, Any]], status: int) -> None:
    output, said, ended = script(started, code)
    assert (said, ended) == (events, status)
    assert output == ("bye\n" if "bye" in code else "late\n" if "late" in code else "")


def serve(started: list[Running], code: str, prefix: str = "") -> Running:
    running = Running("serve")
    started.append(running)
    running.request(code=code, prefix=prefix)
    assert wire.receive(running.control.fileno()) == {"event": "ready"}
    return running


def test_functions_are_called_with_arguments_and_say_what_they_changed(started) -> None:
    running = serve(started, "def f(xs, y=0):\n    xs.append(y)\n    return len(xs)")
    reply = running.call(name="f", args=[[1, 2]], kwargs={"y": wire.encode(3)})
    assert wire.decode(reply["value"]) == 3 and wire.decode(reply["args"][0]) == [1, 2, 3]


def test_errors_come_back_as_their_nearest_built_in_kind(started) -> None:
    running = serve(started, "class Mine(KeyError): pass\ndef f(): raise Mine('no key')\nx = 1")
    assert running.call(name="f") == {"error": "Mine", "builtin": "KeyError", "text": "'no key'"}
    assert running.call(name="g")["error"] == "NameError"
    # It goes on.
    assert running.call(name="f")["error"] == "Mine"


def test_objects_that_cannot_travel_stay_and_are_worked_with_by_number(started) -> None:
    code = """class Box:
    def __init__(self, x): self.x = x
    def double(self): return 2 * self.x
    def __len__(self): return 9
"""
    running = serve(started, code)
    value = running.call(name="Box", args=[21])["value"]
    numbers: list[int] = []
    wire.decode(value, numbers.append)
    (number,) = numbers
    assert wire.decode(running.call(handle=number, op="get", args=["x"])["value"]) == 21
    assert wire.decode(running.call(handle=number, op="length")["value"]) == 9
    running.call(handle=number, op="set", args=["x", 5])
    method: list[int] = []
    wire.decode(running.call(handle=number, op="get", args=["double"])["value"], method.append)
    assert wire.decode(running.call(handle=method[0])["value"]) == 10


def test_the_prefix_is_seen_and_cannot_be_changed_by_the_program(started) -> None:
    running = serve(started, "def g(): return f() + 1\ndef f(): return 10", prefix="def f(): return 1")
    assert wire.decode(running.call(name="f", helper=True)["value"]) == 1
    assert wire.decode(running.call(name="f")["value"]) == 10
    assert wire.decode(running.call(name="g")["value"]) == 11


def test_methods_of_a_solution_are_found_by_name(started) -> None:
    running = serve(started, "class Solution:\n    def f(self, x): return -x")
    assert wire.decode(running.call(name="f", args=[4])["value"]) == -4


def test_a_program_that_fails_to_define_anything_is_never_ready(started) -> None:
    running = Running("serve")
    started.append(running)
    running.request(code="raise ValueError", prefix="")
    assert running.events() == [{"event": "exception", "error": "ValueError"}]
    assert running.process.wait(30) == 1


def test_a_service_ends_with_its_caller(started) -> None:
    running = serve(started, "def f(): pass")
    running.calls.shutdown(socket.SHUT_RDWR)
    assert running.process.wait(30) == 0 and running.events() == []


def test_nothing_but_the_four_descriptors_is_left_open(started) -> None:
    with open(os.devnull) as extra:
        os.set_inheritable(extra.fileno(), True)
        output, _, _ = script(started, "import os\nprint(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])")
    # The last one is that of the listing.
    assert output == "[0, 1, 2, 3, 4]\n"
