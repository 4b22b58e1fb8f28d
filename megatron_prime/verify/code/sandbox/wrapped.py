"""The inside of a bubblewrap: what a fresh interpreter does there before it runs a program."""

from __future__ import annotations

import os
import sys

# The test role needs `assertions`, which is not to be found once a program runs.
from megatron_prime.verify.code.sandbox import assertions, launch, lockdown, program  # noqa: F401

_INTERPRETER_BYTES = 256 * 2**20
"""There is no /proc in there to ask for the size of a fresh interpreter; it is smaller than this."""


def main() -> None:
    """The inside: locks this process in and runs one program.

    Command line: role, four descriptors, bytes of address space, CPU seconds, and the user to become (or 0).
    """
    role, *numbers = sys.argv[1:]
    stdin, stdout, control, calls, memory_bytes, cpu_seconds, user = map(int, numbers)
    program.take_descriptors((stdin, stdout, control, calls))
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    lockdown.lock(lockdown.Bounds(memory_bytes + _INTERPRETER_BYTES, cpu_seconds, count_threads=True), strict=True)
    # Everything of this package is imported; programs need not know where it is.
    sys.path.remove(launch.ROOT)
    program.run(role)
