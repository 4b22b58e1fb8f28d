"""Worker processes that are killed at their limits and replaced, and the thread that feeds them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prime.errors import VerifierError
from megatron_prime.verify import pool
from megatron_prime.verify.math import verifier as math_verifier
from megatron_prime.verify.math.verifier import math_worker_kind
from megatron_prime.verify.pool import WorkerKind, WorkerPool

RULES = [None, False]
"""No tolerance, no unevaluated answers."""
BOMB = [r"1\leq|z|\leq \frac{3}{2}", r"z \in [0, 9^{9^{9^9}}]", *RULES]
EQUAL = ["x+1", "1+x", *RULES]
ECHO = """
import json, os, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
connection.send_bytes(json.dumps("ready").encode())
while True:
    try:
        request = json.loads(connection.recv_bytes())
    except EOFError:
        break
    if request["do"] == "sleep":
        time.sleep(request["seconds"])
    if request["do"] == "die":
        os._exit(3)
    if request["do"] == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(60)
        open(request["note"], "w").write(str(child))
        time.sleep(60)
    connection.send_bytes(json.dumps({"pid": os.getpid(), "number": request.get("number")}).encode())
"""


def echo_kind(name="echo"):
    return WorkerKind(
        name=name,
        command=lambda descriptor: [sys.executable, "-c", ECHO, str(descriptor)],
        version="1",
        advice="nothing helps",
        cacheable=lambda reply: reply["number"] is not None,
    )


@pytest.fixture
def echo():
    workers = WorkerPool([echo_kind()], num_workers=2, cache_size=10)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def grader():
    workers = WorkerPool([math_worker_kind(2.0, memory_gib=2.0)], num_workers=2, cache_size=0)
    yield workers
    workers.close()


def _statuses(workers, cases, limit=5.0):
    pending = [workers.submit("math", case, limit) for case in cases]
    return [outcome.reply if outcome.end == "answered" else outcome.end for outcome in (p.result() for p in pending)]


def _pids(workers):
    return [worker.process.pid for worker in workers._workers]


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for_end(pids):
    deadline = time.monotonic() + 10.0
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "processes are still there"
        time.sleep(0.02)


def test_outcomes_belong_to_their_cases(grader):
    cases = [
        EQUAL,
        ["x+1", "1+2x", *RULES],
        [r"\sqrt{8}", r"2\sqrt{2}", *RULES],
        ["x^2-1", "(x-1)(x+1)", *RULES],
        ["x", r"\frac{", *RULES],
    ]
    assert _statuses(grader, cases) == ["correct", "wrong", "correct", "correct", "malformed"]


def test_small_numbers_are_compared_relatively(grader):
    cases = [
        [r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", *RULES],
        [r"\frac{1}{2004!}", r"\frac{1}{2006!}", *RULES],
    ]
    assert _statuses(grader, cases) == ["wrong", "wrong"]


def test_a_bomb_delays_nobody_else(grader):
    _statuses(grader, [EQUAL, ["y+1", "1+y", *RULES]])
    start, pids = time.monotonic(), _pids(grader)
    bomb = grader.submit("math", BOMB, 5.0)
    others = [grader.submit("math", [f"{n}x+y", f"y+{n}x", *RULES], 5.0) for n in range(20)]
    assert {other.result().reply for other in others} == {"correct"}
    assert time.monotonic() - start < 2.0 and not bomb.done()
    assert bomb.result().reply == "timeout" and bomb.result().seconds < 3.0
    # What replaces the process that took too long has everything imported.
    start = time.monotonic()
    assert _statuses(grader, [EQUAL, ["y+1", "1+y", *RULES]]) == ["correct"] * 2
    assert time.monotonic() - start < 0.5 and _pids(grader) == pids


def test_a_grader_that_does_not_end_itself_is_killed():
    workers = WorkerPool([math_worker_kind(30.0, memory_gib=2.0)], num_workers=1, cache_size=0)
    assert _statuses(workers, [EQUAL]) == ["correct"]
    (pid,) = _pids(workers)
    pids = [pid, *_children(pid)]
    assert len(pids) == 2
    assert workers.submit("math", BOMB, 0.5).result().end == "timeout"
    _wait_for_end(pids)
    workers.close()


def test_equal_cases_share_one_answer_and_certain_ones_are_remembered(echo):
    first, second = (echo.submit("echo", {"do": "sleep", "seconds": 0.2, "number": 1}, 5.0) for _ in range(2))
    assert first is second
    assert first.result().seconds >= 0.2
    again = echo.submit("echo", {"do": "sleep", "seconds": 0.2, "number": 1}, 5.0)
    assert again.result().reply == first.result().reply and again.result().seconds == 0.0
    uncertain = [echo.submit("echo", {"do": "sleep", "seconds": 0.05}, 5.0).result().seconds for _ in range(2)]
    assert min(uncertain) >= 0.05


def test_the_oldest_answers_are_forgotten_and_time_outs_never_remembered(echo):
    for number in range(11):
        echo.submit("echo", {"do": "answer", "number": number}, 5.0).result()
    assert echo.submit("echo", {"do": "answer", "number": 1}, 5.0).result().seconds == 0.0
    assert echo.submit("echo", {"do": "answer", "number": 0}, 5.0).result().seconds > 0.0
    late = {"do": "sleep", "seconds": 30, "number": 1}
    assert [echo.submit("echo", late, 0.2).result().end for _ in range(2)] == ["timeout", "timeout"]


def test_whoever_submits_too_much_waits(echo, monkeypatch):
    monkeypatch.setattr(pool, "MAX_WAITING", 3)
    start = time.monotonic()
    pending = [echo.submit("echo", {"do": "sleep", "seconds": 0.1, "number": n}, 5.0) for n in range(12)]
    # 12 cases, of which 3 wait and 2 are under way: the others are done, two at a time.
    assert time.monotonic() - start > 0.3
    assert [future.result().reply["number"] for future in pending] == list(range(12))


def test_kinds_share_the_number_of_workers():
    workers = WorkerPool([echo_kind("one"), echo_kind("two")], num_workers=1, cache_size=0)
    try:
        start = time.monotonic()
        case = {"do": "sleep", "seconds": 0.2}
        pending = [workers.submit(("one", "two")[n % 2], {**case, "number": n}, 5.0) for n in range(4)]
        pids = [future.result().reply["pid"] for future in pending]
        assert time.monotonic() - start >= 0.8
        assert pids[0] == pids[2] != pids[1] == pids[3]
    finally:
        workers.close()


def test_what_a_worker_has_started_dies_with_it(echo, tmp_path):
    note = tmp_path / "child"
    assert echo.submit("echo", {"do": "fork", "note": str(note)}, 0.5).result().end == "timeout"
    _wait_for_end([int(note.read_text())])


def test_a_worker_that_dies_of_its_case_is_replaced(echo):
    pending = [echo.submit("echo", {"do": "die", "number": 7}, 5.0), echo.submit("echo", {"do": "answer"}, 5.0)]
    assert [future.result().end for future in pending] == ["died", "answered"]
    assert echo.submit("echo", {"do": "answer", "number": 8}, 5.0).result().end == "answered"


def test_an_idle_worker_that_was_killed_loses_no_case(grader):
    _statuses(grader, [EQUAL, ["z+1", "1+z", *RULES]])
    pids = _pids(grader)
    forks = [fork for pid in pids for fork in _children(pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    _wait_for_end([*pids, *forks])
    assert _statuses(grader, [EQUAL, ["2x+1", "1+2x", *RULES], ["3x+1", "1+3x", *RULES]]) == ["correct"] * 3


def test_closing_ends_what_waits_and_what_works(echo):
    pending = [echo.submit("echo", {"do": "sleep", "seconds": 30, "number": n}, 60.0) for n in range(4)]
    while not _pids(echo):
        time.sleep(0.01)
    pids = _pids(echo)
    echo.close()
    _wait_for_end(pids)
    for future in pending:
        with pytest.raises(VerifierError, match="closed"):
            future.result(timeout=1)
    assert echo.submit("echo", {"do": "answer"}, 5.0).result().end == "answered"


def test_workers_start_only_when_needed_and_without_torch():
    workers = WorkerPool([math_worker_kind(5.0, memory_gib=2.0)], num_workers=2, cache_size=0)
    assert _pids(workers) == []
    _statuses(workers, [EQUAL], 5.0)
    assert len(_pids(workers)) == 1
    assert "libtorch" not in Path(f"/proc/{_pids(workers)[0]}/maps").read_text()
    workers.close()
    assert _pids(workers) == []


def test_a_worker_that_cannot_start_is_a_clear_error():
    workers = WorkerPool([math_worker_kind(1.0, memory_gib=0.02)], num_workers=1, cache_size=0)
    with pytest.raises(VerifierError, match=r"verifier\.memory_gib"):
        workers.submit("math", EQUAL, 1.0).result()
    workers.close()


def _kind_without_interpreter(after=0):
    """Whose command line is right so many times only."""
    kind, started = echo_kind(), []

    def command(descriptor):
        started.append(descriptor)
        return kind.command(descriptor) if len(started) <= after else ["/nonexistent/python"]

    return replace(kind, command=command)


def test_a_program_that_cannot_be_started_is_a_clear_error_and_ends_nothing():
    workers = WorkerPool([_kind_without_interpreter(), echo_kind("other")], num_workers=2, cache_size=0)
    try:
        for _ in range(2):
            pending = [workers.submit("echo", {"do": "answer", "number": n}, 5.0) for n in range(2)]
            for future in pending:
                with pytest.raises(VerifierError, match=r"echo worker could not .*/nonexistent/python.*nothing helps"):
                    future.result(timeout=20)
        assert workers.submit("other", {"do": "answer"}, 5.0).result(timeout=20).end == "answered"
    finally:
        workers.close()


def test_a_machine_without_room_for_another_worker_goes_on_with_those_it_has(caplog):
    workers = WorkerPool([_kind_without_interpreter(after=1)], num_workers=2, cache_size=0)
    try:
        pending = [workers.submit("echo", {"do": "sleep", "seconds": 0.1, "number": n}, 5.0) for n in range(3)]
        assert [future.result(timeout=20).end for future in pending] == ["answered"] * 3
        assert "no further echo worker could be started" in caplog.text
    finally:
        workers.close()


def test_a_dead_parent_leaves_no_worker_behind():
    root = str(Path(math_verifier.__file__).parents[2])
    script = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from megatron_prime.verify.math.verifier import math_worker_kind\n"
        "from megatron_prime.verify.pool import WorkerPool\n"
        "pool = WorkerPool([math_worker_kind(1.5, 2.0)], 2, 0)\n"
        "[p.result() for p in [pool.submit('math', ['x+1', f'1+{n}x', None, False], 5.0) for n in range(2)]]\n"
        "print(*[w.process.pid for w in pool._workers], flush=True)\n"
        f"pool.submit('math', {BOMB!r}, 5.0).result()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids and all(_is_alive(pid) for pid in pids)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    _wait_for_end(pids)
