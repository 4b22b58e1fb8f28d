"""Imports vLLM once and forks engines; `trainer.process` starts it as ``python -m``.

Importing vLLM takes most of an engine's start; a fork of this process has it done. Every message on the socket is
the file descriptor of a new engine's connection with the engine's pickled options.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pickle
import signal
import socket
import sys
from multiprocessing.connection import Connection

_MAX_MESSAGE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Forks one engine per message until the trainer hangs up."""
    die_with_parent()
    control = socket.socket(fileno=descriptor)
    logging.getLogger("torch").setLevel(logging.ERROR)
    import vllm
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.platforms import current_platform

    from megatron_prime.rollout.vllm.wire.messages import Started
    from megatron_prime.rollout.vllm.worker import engine_loop, transfer  # noqa: F401

    if current_platform.is_cpu():
        # What an engine would otherwise import when it is built; a GPU must not be touched before the fork.
        import vllm.model_executor.model_loader
        import vllm.v1.worker.cpu_worker  # noqa: F401
    # vLLM collects garbage several times while it builds an engine: what is here already is none.
    gc.collect()
    gc.freeze()

    # The trainer learns of an engine's end by its connection; nobody waits for its exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MAX_MESSAGE_BYTES, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            die_with_parent()
            # The trainer ends the engine's workers with it.
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                with Connection(descriptors[0]) as connection:
                    connection.send(Started(process_id=os.getpid()))
                    engine_loop.serve(connection, pickle.loads(message))
            finally:
                # Exit handlers are the parent's.
                os._exit(0)
        os.close(descriptors[0])


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
