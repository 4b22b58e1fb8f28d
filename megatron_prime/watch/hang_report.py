"""The report on a job in which ranks wait for one that hangs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_prime.watch.rank_status import RankStatus, rank_list

_MAX_CULPRITS = 8
_STOPPED = "T"


def stall_report(
    before: Mapping[int, RankStatus], now: Mapping[int, RankStatus], stack_of: Callable[[RankStatus], str]
) -> str:
    """Who is waited for, where it is, and its stack.

    Args:
        before: status by rank.
        now: the same, after every watchdog should have checked again.
        stack_of: Python stacks of a rank, empty where they cannot be had.
    """
    silent = {rank for rank, status in now.items() if rank in before and status.num_checks == before[rank].num_checks}
    waiting = {rank: status for rank, status in now.items() if status.waits_in and rank not in silent}
    missing = [status for rank, status in now.items() if rank not in waiting]
    others = f"{rank_list(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for it" if waiting else ""
    lines = []
    for status in missing[:_MAX_CULPRITS] or waiting.values():
        state = _state(status, is_silent=status.rank in silent)
        where = f"rank {status.rank} on host {status.host} has been in {status.place()}"
        text = f"{where} for {status.phase_seconds:.0f} s ({state})"
        lines.append("; ".join(filter(None, [text, others if missing else ""])))
        if stack := stack_of(status):
            lines.append(_main_stack(stack))
    if len(missing) > _MAX_CULPRITS:
        lines.append(f"{rank_list(status.rank for sign in missing[_MAX_CULPRITS:])} did not arrive either")
    if not missing:
        lines.append("every rank waits in a collective: they disagree about which one comes next")
    return "\n".join(lines)


def _state(status: RankStatus, *, is_silent: bool) -> str:
    if status.failure:
        return f"failed: {status.failure}"
    if not is_silent:
        return f"waits in {status.waits_in}" if status.waits_in else "its main thread runs or waits in no collective"
    kind = _process_state(status.pid)
    if kind == _STOPPED:
        return f"stopped by a signal, as {signal.Signals.SIGSTOP.name} does"
    return "its heartbeats have stopped"


def _process_state(pid: int) -> str:
    """The letter that the kernel has for the state of a process of this host, empty without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _main_stack(stack: str) -> str:
    # faulthandler writes the threads from the newest to the first, which is the main thread.
    return "\n".join(f"  {line}" for line in stack.rstrip().split("\n\n")[-1].splitlines())
