"""A pool of gloo processes that stay up between tests, forked from one that has imported everything."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

_PATIENCE_SECONDS = 150
_MANY_THREADS = 40
_HERE = str(Path(__file__).parent)
_ROOT = str(Path(__file__).resolve().parents[2])


def _start_process(target: Callable[..., None], *args: Any) -> Any:
    """A fork of the process of `gloo_preload`, which the first call starts."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["gloo_preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_ROOT, _HERE, *([before] if before else [])])
    try:
        process = context.Process(target=target, args=args, daemon=False)
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


def _serve(connection: Connection) -> None:
    assert sys.__stderr__ is not None
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    while True:
        job = connection.recv()
        if job is None:
            return
        function, args, environment = job
        os.environ.update(environment)
        try:
            reply = (True, function(*args))
        except BaseException:  # whatever it is, the test must see it and the pool must go on
            reply = (False, traceback.format_exc())
        gc.collect()
        # Megatron's distributed optimizer keeps its groups through hooks that the collector does not see, and the
        # threads of a group wake up a hundred times a second: a process with many of them makes room for another.
        connection.send((*reply, len(os.listdir("/proc/self/task")) > _MANY_THREADS))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class GlooPool:
    """Runs a module-level function on several processes at once."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results in rank order; the function finds RANK, WORLD_SIZE and the rest in its environment."""
        while len(self._workers) < world_size:
            ours, theirs = mp.Pipe()
            self._workers.append((_start_process(_serve, theirs), ours))
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send((function, args, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        replies: dict[int, Any] = {}
        worn: list[int] = []
        deadline = time.monotonic() + _PATIENCE_SECONDS
        waiting: dict[Any, int] = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                succeeded, reply, has_many_threads = connection.recv()
                if not succeeded:
                    self.close(kill=True)  # the others may wait in a collective
                    pytest.fail(reply)
                rank = waiting.pop(connection)
                replies[rank] = reply
                if has_many_threads:
                    worn.append(rank)
            if not ready:
                self._show_where_they_are()
                self.close(kill=True)
                pytest.fail(f"{function.__name__} hangs on {world_size} processes, ranks {sorted(waiting.values())}")
        if worn:
            self._end([self._workers.pop(rank) for rank in sorted(worn, reverse=True)])
        return [replies[rank] for rank in range(world_size)]

    def _show_where_they_are(self) -> None:
        """Every process writes its Python stacks to its standard error."""
        for process, _ in self._workers:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(2)

    def close(self, kill: bool = False) -> None:
        self._end(self._workers, kill)
        self._workers = []

    @staticmethod
    def _end(workers: list[tuple[Any, Connection]], kill: bool = False) -> None:
        for process, connection in workers:
            if kill:
                process.kill()
            else:
                connection.send(None)
        for process, _ in workers:
            process.join(timeout=30)
