"""The filter of system calls, read by a slow interpreter of its instructions and tried by the kernel itself."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Sequence

import pytest

from megatron_prime.verify.code.sandbox import seccomp
from megatron_prime.verify.code.sandbox.seccomp import build_filter

ALLOW, EPERM, ENOSYS, PRETEND, KILL = "allow", "EPERM", "ENOSYS", "pretend", "kill"
PID = 4711
VERDICTS = {0x7FFF0000: ALLOW, 0x80000000: KILL, 0x00050000: PRETEND, 0x00050001: EPERM, 0x00050026: ENOSYS}
X86, ARM = 0xC000003E, 0xC00000B7

if not seccomp.supported():
    pytest.skip("no table of this machine's system calls", allow_module_level=True)


def verdict(program: bytes, number: int, arguments: Sequence[int] = (), audit: int = X86) -> str:
    """What classic BPF says of a `struct seccomp_data` (number, architecture, instruction pointer, six arguments)."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return VERDICTS[value]
        else:
            holds = accumulator == value if code == 0x15 else bool(accumulator & value)
            assert code in (0x15, 0x45)
            place += if_true if holds else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request, monkeypatch) -> tuple[bytes, int, int]:
    """The filter of a machine for a process, its column in the tables and its architecture's number."""
    monkeypatch.setattr(seccomp.platform, "machine", lambda: request.param)
    seccomp._plain_part.cache_clear()
    yield build_filter(PID), int(request.param == "aarch64"), {"x86_64": X86, "aarch64": ARM}[request.param]
    seccomp._plain_part.cache_clear()


def test_named_calls_are_allowed_and_all_others_are_not(machine) -> None:
    program, column, audit = machine
    named = {entry.split()[0]: int(entry.split()[1 + column]) for entry in seccomp._ALLOWED.split(",")}
    assert all(verdict(program, number, audit=audit) == ALLOW for number in named.values())
    numbers = set(named.values())
    if column == 0:
        numbers |= {int(entry.split()[1]) for entry in seccomp._ALLOWED_X86.split(",")}
    pretended = {entry[column] for entry in seccomp._PRETENDED} | set(seccomp._PRETENDED_X86 if column == 0 else ())
    assert all(verdict(program, number, audit=audit) == PRETEND for number in pretended)
    clone3 = seccomp._CLONE3[column]
    special = {calls[column] for calls in (seccomp._IOCTL, seccomp._PRCTL, seccomp._PRLIMIT)} | {clone3}
    for number in set(range(500)) - numbers - pretended - special - {seccomp._CLONE[column]}:
        assert verdict(program, number, audit=audit) == EPERM, number
    assert verdict(program, clone3, audit=audit) == ENOSYS
    assert not numbers & pretended


def test_another_architectures_calls_end_the_process(machine) -> None:
    program, _, audit = machine
    for other in (X86, ARM, 0x40000003):
        if other != audit:
            assert verdict(program, 0, audit=other) == KILL


def test_arguments_decide_about_calls_that_can_do_good_and_harm(machine) -> None:
    program, column, audit = machine
    asks = [
        (seccomp._CLONE, (0x10000 | 0x100,), ALLOW),  # a thread
        (seccomp._CLONE, (0x11,), EPERM),  # a process
        (seccomp._IOCTL, (0, 0x5401), ALLOW),
        (seccomp._IOCTL, (0, 0x5412), EPERM),  # typing into a terminal
        (seccomp._PRCTL, (15,), ALLOW),
        (seccomp._PRCTL, (4,), EPERM),
        (seccomp._PRLIMIT, (0,), ALLOW),
        (seccomp._PRLIMIT, (PID,), ALLOW),
        (seccomp._PRLIMIT, (1,), EPERM),
        (seccomp._KILL, (PID, 9), ALLOW),
        (seccomp._KILL, (1, 9), EPERM),
        (seccomp._KILL, (0, 9), EPERM),
        (seccomp._TGKILL, (PID, PID, 6), ALLOW),
        (seccomp._TGKILL, (PID + 1, PID + 1, 6), EPERM),
    ]
    for call, arguments, expected in asks:
        assert verdict(program, call[column], arguments, audit) == expected, (call, arguments)
    nobody = build_filter(None)
    assert verdict(nobody, seccomp._KILL[column], (PID, 9), audit) == EPERM


ATTEMPTS = """
import ctypes, errno, json, os, signal, socket, sys, threading
from megatron_prime.verify.code.sandbox.libc import call, prctl
from megatron_prime.verify.code.sandbox.seccomp import build_filter, install_filter

path = sys.argv[1]
call(prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
install_filter(build_filter(os.getpid()))

def outcome(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

thread = threading.Thread(target=lambda: None)
found = {
    "read": outcome(lambda: open(path).read()),
    "thread": outcome(lambda: (thread.start(), thread.join())),
    "kill itself": outcome(lambda: os.kill(os.getpid(), 0)),
    "socket": outcome(lambda: socket.socket()),
    "fork": outcome(os.fork),
    "exec": outcome(lambda: os.execv("/bin/true", ["true"])),
    "kill another": outcome(lambda: os.kill(os.getppid(), 0)),
    "chmod": outcome(lambda: os.chmod(path, 0o777)),
    "mount": outcome(lambda: call(ctypes.CDLL(None, use_errno=True).mount, None, path.encode(), None, 0, None)),
}
print(json.dumps(found))
"""


def test_the_kernel_keeps_to_the_filter(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    path.chmod(0o600)
    command = [sys.executable, "-c", ATTEMPTS, str(path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    allowed, denied = ("read", "thread", "kill itself"), ("socket", "fork", "exec", "kill another", "mount")
    assert {name: found[name] for name in allowed} == dict.fromkeys(allowed, "done")
    assert {name: found[name] for name in denied} == dict.fromkeys(denied, "EPERM")
    # It is told that all is well, and nothing has changed.
    assert found["chmod"] == "done" and path.stat().st_mode & 0o777 == 0o600
