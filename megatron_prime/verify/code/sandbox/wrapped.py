"""The inside of a bubblewrap: what a fresh interpreter does there before it runs a program."""

from __future__ import annotations

import sys

from megatron_prime.verify.code.sandbox import lockdown, program

_INTERPRETER_BYTES = 256 * 2**20
"""There is no /proc in there to ask for the size of a fresh interpreter; it is smaller than this."""


def main() -> None:
    """The inside: locks this process in and runs one program.

    Command line: role, four descriptors, bytes of address space, CPU seconds.
    """
    role, *numbers = sys.argv[1:]
    stdin, stdout, control, calls, memory_bytes, cpu_seconds = map(int, numbers)
    program.take_descriptors((stdin, stdout, control, calls))
    lockdown.lock(lockdown.Bounds(memory_bytes + _INTERPRETER_BYTES, cpu_seconds, count_threads=True), strict=True)
    program.run(role)
