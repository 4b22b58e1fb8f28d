"""The fork server: one process with the usual modules imported, which forks a copy of itself for every program.

With namespaces it is process 1 of its own, in a file tree with nothing but Python, and every program gets a fresh
scratch folder; without, programs see the machine's files. It never reads what a program is or says: those descriptors
pass through it to the worker, so that no program can find another's in the memory it is forked with.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
from typing import NoReturn

# The test role needs `assertions`, and a forked program can import it no more.
from megatron_prime.verify.code.sandbox import assertions, lockdown, namespaces, program  # noqa: F401
from megatron_prime.verify.code.sandbox.libc import PR_SET_PDEATHSIG, set_process_option

_PRELOADED = """
abc array ast base64 bisect calendar cmath collections.abc contextlib copy csv dataclasses datetime decimal enum
fractions functools hashlib heapq io itertools json math numbers operator os pprint queue random re statistics string
struct sys textwrap threading time traceback types typing unicodedata uuid numpy sortedcontainers
"""
"""Modules that programs import all the time; those that are not installed are left out."""


def main() -> None:
    """Builds the walls, imports, and serves until the worker closes its end.

    Command line: descriptor of the channel; ``namespaces`` or ``none``; first of two spare user ids or 0; bytes of
    address space.
    """
    channel, walls, owner = socket.socket(fileno=int(sys.argv[1])), sys.argv[2] == "namespaces", int(sys.argv[3])
    set_process_option(PR_SET_PDEATHSIG, signal.SIGKILL)
    preload()
    memory_bytes = lockdown.address_space_bytes() + int(sys.argv[4])
    try:
        # Programs need not know where this package and the user's projects are.
        files, sys.path[:] = namespaces.python_files(), namespaces.library_folders()
        if walls:
            owner = namespaces.leave_the_host(files, owner)
            _become_process_one()
        elif os.geteuid() == 0 and not owner:
            raise PermissionError("programs would run as root: this user namespace has no other users")
    except (OSError, KeyError) as error:
        channel.sendall(json.dumps({"failed": str(error)}).encode())
        return
    channel.sendall(json.dumps({"ready": True}).encode())
    _Server(channel, walls, owner, memory_bytes).serve()


def preload() -> None:
    """Imports the usual modules."""
    for name in _PRELOADED.split():
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    # Forked programs then write less to the pages that they share with this process.
    gc.collect()
    gc.freeze()


def _become_process_one() -> None:
    """Forks into the new process namespace; this process only waits."""
    child = os.fork()
    if child:
        os.closerange(3, 256)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    set_process_option(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Server:
    def __init__(self, channel: socket.socket, walls: bool, owner: int, memory_bytes: int) -> None:
        self._channel = channel
        self._walls = walls
        self._owner = owner
        self._memory_bytes = memory_bytes

    def serve(self) -> None:
        """Answers ``start`` and ``reap`` until the channel closes."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._channel, 4096, 4)
            if not data:
                return
            request = json.loads(data)
            if "start" in request:
                self._start(request["start"], request["slot"], request["cpu_seconds"], descriptors)
            else:
                self._reap(request["reap"])

    def _start(self, role: str, slot: int, cpu_seconds: int, descriptors: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._run(role, slot, cpu_seconds, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        handle = os.pidfd_open(pid)
        socket.send_fds(self._channel, [json.dumps({"pid": pid}).encode()], [handle])
        os.close(handle)

    def _reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self._channel.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())

    def _run(self, role: str, slot: int, cpu_seconds: int, descriptors: list[int]) -> NoReturn:
        try:
            self._enter(slot, cpu_seconds, descriptors)
            program.run(role)
        finally:
            os._exit(1)

    def _enter(self, slot: int, cpu_seconds: int, descriptors: list[int]) -> None:
        program.take_descriptors(descriptors)
        if self._walls:
            namespaces.fresh_scratch(lockdown.SCRATCH_BYTES)
        os.chdir(namespaces.SCRATCH)
        os.umask(0o077)
        if self._owner:
            user = self._owner + slot
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        counted = self._walls or self._owner != 0
        lockdown.lock(lockdown.Bounds(self._memory_bytes, cpu_seconds, counted), strict=self._walls)


if __name__ == "__main__":
    main()
