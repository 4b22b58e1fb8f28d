"""Which node holds the others up: pairs, judgement, and processes of this machine of which one is slow or not there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_prime.launch.bandwidth import pairings, slow_nodes


@pytest.mark.parametrize("num_nodes", range(1, 12))
def test_everybody_meets_different_partners(num_nodes: int) -> None:
    rounds = pairings(num_nodes, 3)
    assert len(rounds) == min(3, num_nodes - 1 + num_nodes % 2 * (num_nodes > 1))
    for partners in rounds:
        assert all(partners[partner] == node != partner for node, partner in partners.items())
        assert len(partners) == num_nodes - num_nodes % 2
    for node in range(num_nodes):
        met = [partners[node] for partners in rounds if node in partners]
        assert len(set(met)) == len(met) >= min(len(rounds) - 1, 2)


def test_a_node_is_judged_by_the_others_and_by_a_limit() -> None:
    rates = {"n1": 40.0, "n2": 44.0, "n3": 8.0, "n4": 30.0}
    assert list(slow_nodes(rates, 0.0)) == ["n3"]
    assert "exchanges 8 GB/s, the median node 35" in slow_nodes(rates, 0.0)["n3"]
    assert list(slow_nodes(rates, 35.0)) == ["n3", "n4"]
    assert "exchanges 30 GB/s, less than 35" in slow_nodes(rates, 35.0)["n4"]


def start(ranks: list[int], timeout_seconds: float) -> list[subprocess.Popen[str]]:
    """Some of three nodes of one rank each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "megatron_prime.launch.bandwidth", "--nodes=a,b,c", "--mib=32"]
    return [
        subprocess.Popen(
            [*command, f"--timeout-seconds={timeout_seconds}"],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in ranks
    ]


def has_connected(process: subprocess.Popen[str]) -> bool:
    """Whether gloo's thread runs."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/comm")
    return any("gloo" in task.read_text() for task in tasks)


def hold_up(process: subprocess.Popen[str]) -> None:
    """Leaves a process a twentieth of the time as soon as it has met the others."""
    while process.poll() is None:
        if has_connected(process):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def test_a_slow_node_is_named() -> None:
    processes = start([0, 1, 2], 100.0)
    slower = threading.Thread(target=hold_up, args=(processes[2],))
    slower.start()
    printed = [process.communicate(timeout=120)[0] for process in processes]
    slower.join()
    lines = printed[0].splitlines()
    assert lines[:2] == ["ok a", "ok b"], printed
    assert lines[2].startswith("bad c: exchanges ") and lines[3].startswith("all-reduce "), printed
    assert processes[0].returncode == 1


def test_an_absent_node_is_named() -> None:
    processes = start([0, 1], 8.0)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert printed[0].splitlines()[:2] == ["ok a", "ok b"], printed
    assert "bad c: did not come to the all-reduce within 8 s" in printed[0]
    assert processes[0].returncode == 1
