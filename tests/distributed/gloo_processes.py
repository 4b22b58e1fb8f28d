"""A pool of gloo processes that stay up between tests: starting one costs seconds of imports."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.multiprocessing as mp


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
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
        replies = []
        for _, connection in self._workers[:world_size]:
            if not connection.poll(300):
                self.close(kill=True)
                pytest.fail(f"{function.__name__} hangs on {world_size} processes")
            replies.append(connection.recv())
        failures = [text for succeeded, text in replies if not succeeded]
        if failures:
            self.close(kill=True)  # the others may wait in a collective
            pytest.fail("\n".join(failures))
        return [value for _, value in replies]

    def close(self, kill: bool = False) -> None:
        for process, connection in self._workers:
            if kill:
                process.kill()
            else:
                connection.send(None)
        for process, _ in self._workers:
            process.join(timeout=30)
        self._workers = []
