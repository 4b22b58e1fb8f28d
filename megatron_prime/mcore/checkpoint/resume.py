"""Finds the checkpoint that a run continues from, before any model exists."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_prime import collectives
from megatron_prime.checkpoint.manifest import (
    altered_files,
    committed,
    foreign_files,
    problems_of,
    read_manifest,
    remove_leftovers,
    set_aside,
)
from megatron_prime.errors import CheckpointError
from megatron_prime.weights.architecture import ModelArchitecture

logger = logging.getLogger(__name__)


def identity_of(architectures: Mapping[str, ModelArchitecture], dtype: str) -> dict[str, Any]:
    """Returns what must be equal for a run to continue from a checkpoint, in JSON types; models by role."""
    identity: dict[str, Any] = {"roles": sorted(architectures), "dtype": dtype}
    for role, architecture in architectures.items():
        shape = asdict(architecture)
        del shape["hf_config"]
        identity |= {f"{role} {key}": value for key, value in shape.items()}
    return json.loads(json.dumps(identity))


def find_checkpoint(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The newest checkpoint that is whole; collective, every rank reads a share of the files.

    Newer ones that are damaged are renamed, and what a killed run was writing is removed.

    Args:
        folder: holds one folder per checkpoint.
        identity: of the run (`identity_of`).

    Returns:
        The checkpoint, or None where there never was one.

    Raises:
        CheckpointError: on every rank, where none is whole (nothing is touched then), or the newest whole one is of
            another model.
    """
    damaged: dict[Path, list[str]] = {}
    whole = None
    for path in reversed(collectives.broadcast(committed(folder))):
        problems = _all_problems(path)
        if not problems:
            whole = path
            break
        damaged[path] = problems
    if whole is None and damaged:
        lines = [f"{path}: {problem}" for path, problems in damaged.items() for problem in problems]
        raise CheckpointError(
            "\n".join([*lines, f"{folder}: no checkpoint is whole; restore one from a copy, or start over elsewhere"])
        )
    if whole is not None:
        _refuse_another(whole, identity)
    if collectives.is_main():
        _tidy(folder, whole, damaged)
    collectives.barrier()
    return whole


def _all_problems(path: Path) -> list[str]:
    problems = collectives.broadcast(problems_of(path))
    if problems:
        return problems
    files = read_manifest(path).files
    mine = collectives.my_share(sorted(files, key=lambda name: (-files[name].num_bytes, name)))
    return list(itertools.chain(*collectives.all_gather(altered_files(path, mine))))


def _refuse_another(path: Path, identity: dict[str, Any]) -> None:
    stored = read_manifest(path).identity
    differing = [key for key in sorted(stored.keys() | identity.keys()) if stored.get(key) != identity.get(key)]
    if "roles" in differing:
        differing = ["roles"]
    if differing:
        lines = [f"{path}: has {key} {stored.get(key)}, this run {identity.get(key)}" for key in differing]
        fix = "choose another run.name, or continue with the configuration it began with"
        raise CheckpointError("\n".join([*lines, fix]))


def _tidy(folder: Path, whole: Path | None, damaged: dict[Path, list[str]]) -> None:
    for path, problems in damaged.items():
        place = set_aside(path)
        logger.warning(
            "%s is damaged (%s): continuing from %s, kept as %s", path, "; ".join(problems), whole, place.name
        )
    for path in remove_leftovers(folder):
        logger.info("removed %s, which was never finished", path)
    if whole is not None and (foreign := foreign_files(whole)):
        logger.warning("%s: not part of the checkpoint, ignored: %s", whole, ", ".join(foreign))
