"""What is said of a job in which ranks wait for one that does not arrive."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_prime.watch.rank_status import Sign, rank_list

_MAX_CULPRITS = 8
_STOPPED = "T"


def stall_report(before: Mapping[int, Sign], now: Mapping[int, Sign], stack_of: Callable[[Sign], str]) -> str:
    """Who is waited for, where it is, and its stack.

    Args:
        before: signs of life by rank.
        now: the same, after every watchdog should have looked again.
        stack_of: Python stacks of a rank, empty where they cannot be had.
    """
    silent = {rank for rank, sign in now.items() if rank in before and sign.num_looks == before[rank].num_looks}
    waiting = {rank: sign for rank, sign in now.items() if sign.waits_in and rank not in silent}
    missing = [sign for rank, sign in now.items() if rank not in waiting]
    others = f"{rank_list(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for it" if waiting else ""
    lines = []
    for sign in missing[:_MAX_CULPRITS] or waiting.values():
        state = _state(sign, is_silent=sign.rank in silent)
        text = (
            f"rank {sign.rank} on host {sign.host} has been in {sign.place()} for {sign.phase_seconds:.0f} s ({state})"
        )
        lines.append("; ".join(filter(None, [text, others if missing else ""])))
        if stack := stack_of(sign):
            lines.append(_main_stack(stack))
    if len(missing) > _MAX_CULPRITS:
        lines.append(f"{rank_list(sign.rank for sign in missing[_MAX_CULPRITS:])} did not arrive either")
    if not missing:
        lines.append("every rank waits in a collective: they disagree about which one comes next")
    return "\n".join(lines)


def _state(sign: Sign, *, is_silent: bool) -> str:
    if sign.failure:
        return f"failed: {sign.failure}"
    if not is_silent:
        return f"waits in {sign.waits_in}" if sign.waits_in else "its main thread runs or waits in no collective"
    kind = _process_state(sign.pid)
    if kind == _STOPPED:
        return f"stopped by a signal, as {signal.Signals.SIGSTOP.name} does"
    return "gives no sign of life"


def _process_state(pid: int) -> str:
    """The letter that the kernel has for the state of a process of this host, empty without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _main_stack(stack: str) -> str:
    # faulthandler writes the threads from the newest to the first, which is the main thread.
    return "\n".join(f"  {line}" for line in stack.rstrip().split("\n\n")[-1].splitlines())
