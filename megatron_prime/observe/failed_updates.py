"""Updates that were NaN or Inf, as files of the run folder that `megatron-prime replay` reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prime import collectives
from megatron_prime.batch import ModelUpdate, PolicyUpdate, PrmBatch, PrmUpdate, RolloutBatch, ScoredBatch
from megatron_prime.config import PrimeConfig, to_dict
from megatron_prime.config.validation import validate
from megatron_prime.errors import ConfigError, DataError

_VERSION = 2
_MAX_FILES = 5
"""Files kept per run; each holds a whole batch, or a window of them."""
_WHERE = "those are runs/NAME/failures/step_*.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedUpdate:
    """Contents of a file."""

    update: ModelUpdate
    reason: str
    config: PrimeConfig
    """Configuration of the run."""


class FailedUpdateFiles:
    """Writes the files on the main process; every process gets the path.

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
            fields = asdict(update) | {"role": update.role}
            content = {"version": _VERSION, "update": fields, "reason": reason, "config": self._config}
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
        update = _update(content["update"])
        config = validate(PrimeConfig, content["config"])
        return FailedUpdate(update=update, reason=content["reason"], config=config)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {_WHERE}") from error
    except ConfigError as error:
        raise DataError("\n".join(f"{path}: {problem}" for problem in error.problems)) from error
    except DataError:
        raise
    except Exception as error:
        # torch unzips and unpickles: anything can be wrong with another file, and what torch says of it misleads.
        raise DataError(f"{path}: is no failed update of a run, or damaged; {_WHERE}") from error


def _update(fields: dict[str, Any]) -> ModelUpdate:
    step, seed = fields["step"], fields["seed"]
    if fields["role"] == "policy":
        batch = ScoredBatch(**_batch(fields["batch"]))
        return PolicyUpdate(step=step, batch=batch, advantages=fields["advantages"], seed=seed)
    return PrmUpdate(step=step, batches=tuple(PrmBatch(**_batch(batch)) for batch in fields["batches"]), seed=seed)


def _batch(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "rollout": RolloutBatch(**fields["rollout"])}
