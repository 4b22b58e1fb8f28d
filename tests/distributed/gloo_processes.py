"""A pool of gloo processes that stay up between tests: starting one costs seconds of imports."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch.multiprocessing as mp

_PATIENCE_SECONDS = 150


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    while True:
        job = connection.recv()
        if job is None:
            return
        function, args, environment = job
        os.environ.update(environment)
        try:
            connection.send((True, function(*args)))
        except BaseException:  # whatever it is, the test must see it and the pool must go on
            connection.send((False, traceback.format_exc()))
        # Groups in reference cycles would keep their threads, which wake up a hundred times a second.
        gc.collect()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class GlooPool:
    """Runs a module-level function on several processes at once."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results in rank order; the function finds RANK, WORLD_SIZE and the rest in its environment."""
        context = mp.get_context("spawn")
        while len(self._workers) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            self._workers.append((process, ours))
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send((function, args, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                succeeded, reply = connection.recv()
                if not succeeded:
                    self.close(kill=True)  # the others may wait in a collective
                    pytest.fail(reply)
                replies[waiting.pop(connection)] = reply
            if not ready:
                self._show_where_they_are()
                self.close(kill=True)
                pytest.fail(f"{function.__name__} hangs on {world_size} processes, ranks {sorted(waiting.values())}")
        return [replies[rank] for rank in range(world_size)]

    def _show_where_they_are(self) -> None:
        """Every process writes its Python stacks to its standard error."""
        for process, _ in self._workers:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(2)

    def close(self, kill: bool = False) -> None:
        for process, connection in self._workers:
            if kill:
                process.kill()
            else:
                connection.send(None)
        for process, _ in self._workers:
            process.join(timeout=30)
        self._workers = []
