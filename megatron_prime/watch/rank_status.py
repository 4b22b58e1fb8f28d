"""What each rank does, in a status file of its own below the run folder.

Nobody has to take part for a file to be read, so they also tell about ranks that are stuck, stopped or dead. Ranks on
several hosts need what checkpoints need as well: a run folder that all of them see.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

RANKS_FOLDER = "ranks"
"""Name of the folder of status files in the run folder."""
_NUM_BYTES = 1024
_MAX_FAILURE_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStatus:
    """The last status of a rank."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    """0 before the first one."""
    phase_seconds: float
    """In this phase."""
    num_checks: int
    """How often the rank's watchdog has checked so far: that of a stopped process does not."""
    idle_seconds: float = 0.0
    """Since its main thread last computed, or what it waits for last sent a heartbeat."""
    waits_in: str | None = None
    """The collective that it waits in."""
    failure: str | None = None
    """Why it ends."""

    def place(self) -> str:
        """Where it is, for a message."""
        return f"phase {self.phase} of step {self.step}" if self.step else f"phase {self.phase}"


class StatusFile:
    """The file of one rank.

    Args:
        folder: of all ranks' files; made where it is missing.
        rank: its number.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank_{rank:05}.json", os.O_WRONLY | os.O_CREAT, 0o644)

    def write(self, status: RankStatus) -> None:
        """Replaces what is there in one call, so that a reader sees the old or the new."""
        content = asdict(status) | {"failure": status.failure and status.failure[:_MAX_FAILURE_CHARACTERS]}
        os.pwrite(self._file, json.dumps(content).encode().ljust(_NUM_BYTES), 0)

    def close(self) -> None:
        """Ends the writing; the last status stays."""
        os.close(self._file)


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """The newest status of every rank that has written one, by rank."""
    found: dict[int, RankStatus] = {}
    for path in sorted(folder.glob("rank_*.json")):
        try:
            status = RankStatus(**json.loads(path.read_bytes()))
            age = max(0.0, time.time() - path.stat().st_mtime)
        except (OSError, ValueError, TypeError):
            continue
        found[status.rank] = replace(status, phase_seconds=status.phase_seconds + age)
    return found


def rank_list(ranks: Iterable[int]) -> str:
    """``rank 1``, ``ranks 0-2, 5``."""
    numbers = sorted(ranks)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"
