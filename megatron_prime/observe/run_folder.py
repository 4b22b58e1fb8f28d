"""Defines the files of a run and their places."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import megatron_prime
from megatron_prime import collectives
from megatron_prime.checkpoint.manifest import committed
from megatron_prime.config import AnyConfig, load_config, save_config, to_dict
from megatron_prime.config.keys import changeable_keys
from megatron_prime.errors import ConfigError
from megatron_prime.observe.atomic_files import write_atomically

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "megatron-core", "transformers", "megatron-prime")


class RunFolder:
    """The folder of one run. Every process knows its paths; only the main process writes.

    Args:
        directory: where run folders are made (`run.directory`).
        name: the run's folder below it (`run.name`).
    """

    def __init__(self, directory: str | Path, name: str) -> None:
        self.path = Path(directory) / name
        self.config_path = self.path / "config.yaml"
        self.versions_path = self.path / "versions.json"
        self.head_path = self.path / "head.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.loggers = self.path / "loggers"
        self.plots = self.path / "plots"
        self.failures = self.path / "failures"
        self._lock: IO[str] | None = None

    def logger_folder(self, name: str) -> Path:
        """The folder of one entry of `run.loggers`, below `loggers` but for TensorBoard's."""
        return self.tensorboard if name == "tensorboard" else self.loggers / name.replace(":", ".")

    def has_checkpoint(self) -> bool:
        """Returns whether there is a checkpoint to continue from."""
        return bool(committed(self.checkpoints))

    def prepare(self, config: AnyConfig, resume: Literal["auto", "never"]) -> None:
        """Makes the folders and writes the resolved configuration; collective.

        Without a checkpoint the run starts over, so what an earlier try measured before it ended is removed.

        Args:
            config: the resolved configuration.
            resume: ``never`` refuses a folder that holds a checkpoint.

        Raises:
            ConfigError: on every process, where ``resume`` forbids the folder, the resumed run had another
                configuration, a finished run's checkpoints are gone, or another process trains in the folder.
        """
        if problem := collectives.broadcast(self._keep_others_out() if collectives.is_main() else None):
            raise ConfigError(problem)
        has_checkpoint = collectives.broadcast(self.has_checkpoint())
        if has_checkpoint and resume == "never":
            raise ConfigError(
                f"run.resume: never, but {self.checkpoints} holds a checkpoint"
                "; choose another run.name, remove the folder or set run.resume=auto"
            )
        if has_checkpoint:
            self._refuse_another(config)
        elif collectives.broadcast(self.summary_path.exists()):
            raise ConfigError(
                f"run.name: {self.path} holds a finished run (summary.json) whose checkpoints are gone"
                "; choose another run.name, or remove the folder"
            )
        if collectives.is_main():
            for folder in (self.path, self.checkpoints, self.plots):
                folder.mkdir(parents=True, exist_ok=True)
            if not has_checkpoint:
                for stale in (self.metrics_path, *self.tensorboard.glob("events.*")):
                    stale.unlink(missing_ok=True)
                shutil.rmtree(self.loggers, ignore_errors=True)
            save_config(config, self.config_path)
        collectives.barrier()

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _keep_others_out(self) -> str | None:
        """Locks the folder until `close`, or this process's end; who has locked it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            return f"run.name: {lock.read() or 'another process'} trains in {self.path}; choose another run.name"
        except OSError:
            logger.warning("%s: this file system has no locks: see to it that no other run uses the folder", self.path)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return None

    def _refuse_another(self, config: AnyConfig) -> None:
        """Compares with the configuration that the run began with."""
        if not collectives.broadcast(self.config_path.exists()):
            return
        before, now = _flat(to_dict(load_config(self.config_path))), _flat(to_dict(config))
        # A longer run stretches a decaying learning rate.
        may_change = set(changeable_keys(type(config)))
        problems = [
            f"{key}: {now.get(key)!r}, but the run in {self.path} began with {before.get(key)!r}"
            "; continue with that, or choose another run.name"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in may_change
        ]
        if problems:
            raise ConfigError(problems)

    def write_versions(self) -> None:
        """Writes the versions of Python, of the packages that decide results, and of this code."""
        if collectives.is_main():
            write_atomically(self.versions_path, json.dumps(versions(), indent=2) + "\n")

    def recorded_head(self) -> dict[str, str] | None:
        """Returns the log-prob op's settings of the run that is resumed; None for a new run."""
        if self.has_checkpoint() and self.head_path.exists():
            return json.loads(self.head_path.read_text(encoding="utf-8"))
        return None

    def write_head(self, choices: Mapping[str, str]) -> None:
        """Records how the log-prob op is computed, so that a resumed run computes the same bits."""
        if collectives.is_main():
            write_atomically(self.head_path, json.dumps(dict(choices), indent=2) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drops the metrics of steps after ``step``, which a resumed run will measure again; collective."""
        if collectives.is_main() and self.metrics_path.exists():
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
            write_atomically(self.metrics_path, "".join(kept))
            if len(kept) < len(lines):
                logger.info("dropped %d rows after step %d of %s", len(lines) - len(kept), step, self.metrics_path)
        collectives.barrier()


def versions() -> dict[str, str | None]:
    """Version by package name, with ``python`` and ``commit`` (``None``: not installed, not in a repository)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "commit": commit()}


def commit() -> str | None:
    """Git commit of this package's source, with ``-dirty`` where tracked files differ from it."""
    package = Path(megatron_prime.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # Installed in a virtual environment inside some other repository, that one's commit says nothing.
    if top is None or Path(top) != package.parent:
        return None
    head = _git(package, "rev-parse", "HEAD")
    dirty = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and dirty else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to full key paths."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _step_of(line: str) -> int | None:
    """Step of a row, ``None`` where the row was cut off by the end of its process."""
    if not line.endswith("\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
