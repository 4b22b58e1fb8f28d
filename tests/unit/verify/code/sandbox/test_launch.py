"""Hostile programs: no escape, no survivor, no file outside, and an end in time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from code_cases import LIMITS, read_cases, squares_problem, status_of

from megatron_prime.verify.code.judge import Limits
from megatron_prime.verify.code.sandbox.bubblewrap import _Wrapped
from megatron_prime.verify.code.sandbox.launch import ForkServer, SandboxError

HOSTILE = read_cases("hostile")
SHORT = Limits(test_seconds=0.5, total_seconds=5.0)
ROOT = Path(__file__).parents[5]
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/", "/home")
ENDS = {
    "inf_loop": "time_limit",
    "sleep": "time_limit",
    "ignore_term": "time_limit",
    "big_pow": "time_limit",
    "deep_recursion": "time_limit",
    "stdout_flood": "output_limit",
    "file_flood": "runtime_error",
    "fork_bomb": "runtime_error",
    "daemonize": "runtime_error",
}


@pytest.fixture(scope="module")
def listener():
    """Something on this machine that a program must not reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _children(server):
    """Processes below the fork server that are no part of it."""
    inner = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children").read_text().split()
    return [pid for process in inner for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _found_outside():
    return [
        f"{place}/{name}"
        for place in PLACES
        if os.path.isdir(place)
        for name in os.listdir(place)
        if name.startswith(("left_behind", "pcescape", "big"))
    ]


def _attack(launcher, case, port):
    contains = "def check(input, output, expected):\n    return expected in output"
    content = {"inputs": [""], "outputs": [case["must_not_print"] or "\0"], "checker": {"code": contains}}
    limits = SHORT if ENDS.get(case["id"], "time_limit") == "time_limit" else LIMITS
    return status_of(launcher, content, case["code"].replace("18999", str(port)), limits)


def test_there_are_38_hostile_programs():
    assert len({case["id"] for case in HOSTILE}) == 38


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case["id"])
def test_hostile_program_in_the_fork_server(fork_server, listener, case):
    before, start = _found_outside(), time.monotonic()
    status = _attack(fork_server, case, listener)
    assert time.monotonic() - start < 6.0
    assert status == ENDS.get(case["id"], status) and status in (
        "wrong_answer",
        "runtime_error",
        "time_limit",
        "memory_limit",
        "output_limit",
    )
    assert _children(fork_server) == []
    assert _found_outside() == before
    assert status_of(fork_server, squares_problem(), "n = int(input())\nprint(n * n + 7)") == "pass"


@pytest.mark.parametrize("case", [c for c in HOSTILE if c["must_not_print"]][::2], ids=lambda case: case["id"])
def test_hostile_program_in_bubblewrap(bubblewrap, listener, case):
    before = _found_outside()
    assert _attack(bubblewrap, case, listener) in ("wrong_answer", "runtime_error")
    assert _found_outside() == before


def test_programs_share_nothing(fork_server):
    write = "open('/tmp/note', 'w').write('7')\nprint(open('/tmp/note').read())"
    read = "import os\nprint(os.listdir('/tmp'), os.listdir('/dev'), 'numpy' in os.listdir('/') or 'ok')"
    assert status_of(fork_server, {"inputs": [""], "outputs": ["7"]}, write) == "pass"
    assert status_of(fork_server, {"inputs": [""], "outputs": ["[] ['null'] ok"]}, read) == "pass"


def test_a_program_does_the_same_every_time(fork_server):
    order = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))"
    collect = "def check(input, output, expected):\n    raise KeyError(output)"
    assert status_of(fork_server, {"inputs": [""], "outputs": [""], "checker": {"code": collect}}, order) == "bad_tests"
    same = "import os\nprint(hash('a') == int(input()))"
    expected = subprocess.run(
        [sys.executable, "-c", "print(hash('a'))"], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True
    ).stdout
    assert status_of(fork_server, {"inputs": [expected], "outputs": ["True"]}, same) == "pass"


def test_the_fork_server_dies_with_its_worker():
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from megatron_prime.verify.code.sandbox.launch import ForkServer\n"
        f"server = ForkServer({os.geteuid() == 0}, 2**30)\n"
        "print(server._process.pid, flush=True); time.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 5.0
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_limits_are_per_program_and_threads_work(fork_server):
    code = (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
        "thread = threading.Thread(target=lambda: print(depth(50000)))\nthread.start()\nthread.join()"
    )
    assert status_of(fork_server, {"inputs": [""], "outputs": ["50000"]}, code) == "pass"


@pytest.mark.parametrize("isolation", ["fork_server", "bubblewrap"])
def test_an_ordinary_user_gets_the_same_isolation(request, isolation):
    """With Debian's own interpreter: the one of the tests may be out of that user's reach."""
    request.getfixturevalue(isolation)
    if os.geteuid() != 0 or not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("needs root, to become another user, and /usr/bin/python3")
    script = (
        "from megatron_prime.verify.code import worker\n"
        f"launcher = worker.make_launcher({isolation!r}, 2**30)\n"
        'tests = \'{"inputs": ["1"], "outputs": ["2"]}\'\n'
        "for code in ('print(int(input()) + 1)', 'import os; print(os.setuid(0) or 2)', 'while True: pass'):\n"
        "    request = {'ground_truth': tests, 'code': code, 'mode': 'all_or_nothing'}\n"
        "    print(worker._answer(launcher, worker.Limits(1.0, 5.0), request)['status'])\n"
    )
    result = subprocess.run(
        ["/usr/bin/python3", "-c", script], env={"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True,
        user=54321, group=54321, extra_groups=[],
    )  # fmt: skip
    assert result.stdout.split() == ["pass", "runtime_error", "time_limit"], result.stderr


REFUSE = """
import sys
from megatron_prime.verify.code.sandbox import seccomp
from megatron_prime.verify.code.sandbox.libc import PR_SET_NO_NEW_PRIVS, set_process_option
numbers = {"x86_64": (272, 56), "aarch64": (97, 220)}[seccomp.platform.machine()]
ins, (unshare, clone) = seccomp._instruction, numbers
eperm = ins(seccomp._RETURN, seccomp._ERRNO | 1)
rules = [ins(seccomp._LOAD, 0), *seccomp._when(unshare, [eperm]),
    *seccomp._when(435, [ins(seccomp._RETURN, seccomp._ERRNO | 38)]),
    *seccomp._when(clone, [ins(seccomp._LOAD, 16), ins(seccomp._JUMP_BITS, 0x7E020000, 0, 1), eperm,
        ins(seccomp._RETURN, seccomp._ALLOW)]),
    ins(seccomp._RETURN, seccomp._ALLOW)]
set_process_option(PR_SET_NO_NEW_PRIVS, 1)
seccomp.install_filter(b"".join(rules))
from megatron_prime.config.schema_verifier import CodeVerifierSection, VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.routing import build_verifier
from megatron_prime.batch import Prompt, Response
try:
    build_verifier(VerifierSection(), ["code"])
except VerifierError as error:
    print(error)
prompt = Prompt(prompt_id="p", text="", token_ids=(), ground_truth='{"inputs": [""], "outputs": ["1"]}', ability="code")
answer = Response(text="```python\\nprint(1)\\n```", token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
with build_verifier(VerifierSection(code=CodeVerifierSection(isolation="rlimits_unsafe")), ["code"]) as verifier:
    print(verifier.verify([(prompt, answer)])[0].status)
"""


def test_a_machine_without_namespaces_is_refused_unless_told_otherwise():
    """As in a container whose seccomp profile forbids them."""
    result = subprocess.run([sys.executable, "-c", REFUSE], capture_output=True, text=True, cwd=ROOT)
    *message, status = result.stdout.splitlines()
    text = "\n".join(message)
    assert "no safe way to run programs" in text and "fork_server: " in text and "bubblewrap: " in text, result.stderr
    assert "rlimits_unsafe" in text and "Operation not permitted" in text
    assert status == "pass"


class _CannotLock:
    """Processes of some roles end before they are locked in; the others are a fork server's."""

    def __init__(self, server, roles):
        self._server, self._roles = server, roles

    def start(self, role, slot, cpu_seconds, descriptors):
        if role in self._roles:
            return _Wrapped(subprocess.Popen(["true"]))
        return self._server.start(role, slot, cpu_seconds, descriptors)


@pytest.mark.parametrize(
    ("roles", "content"),
    [
        (["script"], {"inputs": [""], "outputs": ["1"]}),
        (["test"], {"inputs": [""], "outputs": ["1"], "checker": {"code": "def check(*texts): return True"}}),
        (["serve"], {"fn_name": "f", "inputs": [[]], "outputs": [1]}),
        (["serve"], {"assert_code": "assert f() == 1"}),
        (["test"], {"assert_code": "assert f() == 1"}),
    ],
)
def test_a_process_that_cannot_lock_itself_in_is_no_fault_of_the_program(fork_server, roles, content):
    code = "def f(): return 1\nprint(1)"
    assert status_of(_CannotLock(fork_server, roles), content, code) == "harness_error"


def test_a_killed_fork_server_is_noticed():
    server = ForkServer(False, 2**30)
    threading.Timer(0.2, lambda: os.kill(server._process.pid, signal.SIGKILL)).start()
    try:
        with pytest.raises(SandboxError, match="fork server"):
            for _ in range(3):
                status_of(server, {"inputs": [""], "outputs": ["1"]}, "import time\ntime.sleep(5)", LIMITS)
    finally:
        server.close()
