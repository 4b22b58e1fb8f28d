"""Worker processes that are killed at their limits and replaced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prime.errors import VerifierError
from megatron_prime.verify import pool as pool_module
from megatron_prime.verify.pool import GraderPool

BOMB = ("3", "9^{9^{9^9}}")


@pytest.fixture(scope="module")
def pool():
    grader = GraderPool(num_workers=2, timeout_seconds=2.0, memory_gib=2.0)
    yield grader
    grader.close()


def _pids(grader):
    return [worker._process.pid for worker in grader._workers]


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


def test_keeps_the_order_of_the_cases(pool):
    cases = [("x+1", "1+x"), ("x+1", "1+2x"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), ("x", r"\frac{")]
    statuses = [outcome.status for outcome in pool.run(cases)]
    assert statuses == ["correct", "wrong", "correct", "correct", "malformed"]


def test_small_numbers_are_compared_relatively(pool):
    cases = [(r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}")]
    assert [outcome.status for outcome in pool.run(cases)] == ["wrong", "wrong"]


def test_a_bomb_costs_its_own_limit_only(pool):
    pool.run([("x+1", "1+x")] * 2)
    start = time.monotonic()
    outcomes = pool.run([BOMB, *[("x+y", "y+x")] * 20])
    assert outcomes[0].status == "timeout"
    assert {outcome.status for outcome in outcomes[1:]} == {"correct"}
    assert time.monotonic() - start < 8.0
    assert pool.run([("x+1", "1+x")])[0].status == "correct"


def test_an_idle_worker_that_was_killed_loses_no_case(pool):
    while not (pool._workers and all(worker.idle for worker in pool._workers)):
        pool.run([("x+1", "1+x")] * 2)
    for pid in _pids(pool):
        os.kill(pid, signal.SIGKILL)
    _wait_for_end(_pids(pool))
    assert [outcome.status for outcome in pool.run([("x+1", "1+x")] * 3)] == ["correct"] * 3


def test_a_worker_that_dies_of_its_case_is_an_error_and_is_replaced():
    grader = GraderPool(num_workers=1, timeout_seconds=60.0, memory_gib=2.0)
    try:
        grader.run([("x+1", "1+x")])
        pid = _pids(grader)[0]
        killer = subprocess.Popen([sys.executable, "-c", f"import os,time; time.sleep(0.5); os.kill({pid}, 9)"])
        assert [o.status for o in grader.run([BOMB, ("x+1", "1+x")])] == ["grader_error", "correct"]
        killer.wait()
        assert _pids(grader) != [pid]
    finally:
        grader.close()


def test_workers_start_quickly_and_only_when_needed():
    grader = GraderPool(num_workers=2, timeout_seconds=5.0, memory_gib=2.0)
    assert grader.run([]) == [] and _pids(grader) == []
    start = time.monotonic()
    grader.run([("x+1", "1+x")])
    assert len(_pids(grader)) == 1
    assert time.monotonic() - start < 30.0
    assert "libtorch" not in Path(f"/proc/{_pids(grader)[0]}/maps").read_text()
    grader.close()
    assert _pids(grader) == []


def test_a_worker_that_cannot_start_is_a_clear_error():
    with pytest.raises(VerifierError, match=r"verifier\.memory_gib"):
        GraderPool(num_workers=1, timeout_seconds=1.0, memory_gib=0.02).run([("x+1", "1+x")])


def test_a_dead_parent_leaves_no_worker_behind():
    root = str(pool_module._WORKER_SCRIPT.parents[2])
    script = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from megatron_prime.verify.pool import GraderPool\n"
        "pool = GraderPool(2, 1.5, 2.0)\n"
        "pool.run([('x+1', '1+x')] * 2)\n"
        "print(*[w._process.pid for w in pool._workers], flush=True)\n"
        f"pool.run([{BOMB!r}])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(_is_alive(pid) for pid in pids)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    _wait_for_end(pids)
