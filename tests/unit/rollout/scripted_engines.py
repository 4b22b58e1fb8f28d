"""Engine processes without vLLM: threads that speak an engine's protocol, each with a process that can be killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from megatron_prime.rollout.vllm.wire.messages import (
    EngineOptions,
    EngineRequest,
    Failed,
    Finished,
    Generate,
    Loaded,
    LoadWeights,
    Ready,
    SharedUpdate,
    Started,
)
from megatron_prime.rollout.vllm.wire.shared_memory import SharedWeights

Script = Callable[[Connection, int], None]
"""What an engine says and does, on its end of the connection and with its process id."""


class ScriptedParent:
    """Stands where an `EngineParent` does."""

    on_gpu, is_alive = False, True

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.processes: list[subprocess.Popen[bytes]] = []

    def fork(self, options: EngineOptions) -> Connection:
        """Starts the next engine."""
        code = "import time; time.sleep(1000)"
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        self.processes.append(process)
        ours, theirs = Pipe()
        script = self.scripts.pop(0)
        threading.Thread(target=_run, args=(script, theirs, process.pid), daemon=True).start()
        return ours

    def close(self) -> None:
        """Ends what is left."""
        for process in self.processes:
            process.kill()
            process.wait()


def _run(script: Script, connection: Connection, process_id: int) -> None:
    try:
        script(connection, process_id)
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        connection.close()


def answer(request: EngineRequest, version: int) -> Finished:
    """The prompt backwards."""
    return Finished(
        request_id=request.request_id,
        token_ids=tuple(reversed(request.prompt_token_ids)),
        logprobs=tuple(-0.5 for _ in request.prompt_token_ids),
        finish_reason="length",
        weight_versions=(version,),
    )


def engine(*, fails_after: int | None = None, refuses_version: int | None = None) -> Script:
    """An engine that loads whatever lies in shared memory and answers, until it fails.

    Args:
        fails_after: how many answers it gives before it ends without a word; None: it goes on.
        refuses_version: weights that it says it cannot load.
    """

    def run(connection: Connection, process_id: int) -> None:
        connection.send(Started(process_id=process_id))
        connection.send(Ready())
        version, left = -1, fails_after
        while True:
            message = connection.recv()
            if isinstance(message, LoadWeights):
                if message.version == refuses_version:
                    connection.send(Failed(text="the engine's weights differ"))
                    return
                assert isinstance(message.update, SharedUpdate)
                memory = SharedWeights(message.update.plan, message.update.path, writable=False)
                memory.wait(len(message.update.plan.entries), 20.0)
                version = message.version
                connection.send(Loaded(version=version, num_probed_columns=0))
                continue
            assert isinstance(message, Generate)
            for request in message.requests:
                if left == 0:
                    return
                left = None if left is None else left - 1
                connection.send(answer(request, version))

    return run
