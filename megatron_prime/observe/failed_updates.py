"""Updates that were not finite, as files of the run folder that `megatron-prime replay` reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prime import collectives
from megatron_prime.batch import ModelUpdate, RolloutBatch, ScoredBatch
from megatron_prime.config import PrimeConfig, to_dict
from megatron_prime.config.decode import decode
from megatron_prime.errors import DataError

_VERSION = 1
_MAX_FILES = 5
"""Of one run: a file has a whole batch, or a window of them."""
_WHERE = "those are runs/NAME/failures/step_*.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedUpdate:
    """What a file holds."""

    update: ModelUpdate
    reason: str
    config: PrimeConfig
    """Of the run."""


class FailedUpdateFiles:
    """Writes the files; the main process does, every one is told the path.

    Args:
        folder: made with the first file.
        config: of the run.
    """

    def __init__(self, folder: Path, config: PrimeConfig) -> None:
        self._folder = folder
        self._config = to_dict(config)

    def keep(self, update: ModelUpdate, reason: str) -> Path:
        """Writes a file, and removes the oldest where there are more than five."""
        path = self._folder / f"step_{update.step:08}_{update.role}.pt"
        if collectives.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
            content = {"version": _VERSION, "update": asdict(update), "reason": reason, "config": self._config}
            torch.save(content, path)
            for old in sorted(self._folder.glob("step_*.pt"))[:-_MAX_FILES]:
                old.unlink()
        return path


def read_failed_update(path: Path) -> FailedUpdate:
    """Reads a file.

    Raises:
        DataError: there is none, or it is something else.
    """
    try:
        content = torch.load(path, weights_only=True)
        if content["version"] != _VERSION:
            raise DataError(f"{path}: written by another version; use the one that made it")
        fields = content["update"]
        batches = tuple(_scored_batch(batch) for batch in fields["batches"])
        update = ModelUpdate(**{**fields, "batches": batches})
        problems: list[str] = []
        config = decode(PrimeConfig, content["config"], problems)
        if problems:
            raise DataError("\n".join(f"{path}: {problem}" for problem in problems))
        return FailedUpdate(update=update, reason=content["reason"], config=config)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {_WHERE}") from error
    except DataError:
        raise
    except Exception as error:
        # torch unzips and unpickles: anything can be wrong with another file, and what torch says of it misleads.
        raise DataError(f"{path}: is no failed update of a run, or damaged; {_WHERE}") from error


def _scored_batch(fields: dict[str, Any]) -> ScoredBatch:
    return ScoredBatch(**{**fields, "rollout": RolloutBatch(**fields["rollout"])})
