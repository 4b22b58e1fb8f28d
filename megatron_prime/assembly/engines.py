"""The rollout engine of a configuration: a built-in one or the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from megatron_prime.assembly.contracts.engine import problems_with_engine
from megatron_prime.config.checks import raise_for_problems
from megatron_prime.config.schema import RolloutSection
from megatron_prime.data.tokenizer import end_token_ids, load_tokenizer
from megatron_prime.interfaces import Engine, EngineSetup, RankPlace
from megatron_prime.mcore.dtypes import DTYPES
from megatron_prime.mcore.parallel import Layout
from megatron_prime.sockets import resolve
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder


@contextmanager
def running_engine(
    folder: str,
    dtype: str,
    section: RolloutSection,
    architecture: ModelArchitecture,
    layout: Layout | None,
    num_threads: int,
) -> Iterator[Engine]:
    """The engine of a configuration, without weights; `layout` None: this process is alone."""
    tokenizer = load_tokenizer(folder)
    setup = EngineSetup(
        folder=folder,
        dtype=dtype,
        section=section,
        architecture=architecture,
        place=rank_place(layout),
        num_threads=num_threads,
        end_token_ids=end_token_ids(tokenizer, folder),
        decode=lambda ids: str(tokenizer.decode(list(ids))),
    )
    engine: Engine = resolve("rollout.engine", section.engine)(setup)
    raise_for_problems(problems_with_engine(section.engine, engine))
    with closing(engine):
        yield engine


def rank_place(layout: Layout | None) -> RankPlace:
    """What engines are told of a layout; None: this process is alone."""
    if layout is None:
        return RankPlace(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    groups = layout.export_groups()
    return RankPlace(
        device=layout.device,
        copy_index=layout.copy_index,
        num_copies=layout.num_copies,
        rank_in_copy=groups.pp_rank * groups.stage_size + groups.stage_rank,
        ranks_per_copy=groups.stage_size * groups.pp_size,
    )


@contextmanager
def loaded_engine(path: str, dtype: str, section: RolloutSection, num_threads: int) -> Iterator[tuple[Engine, str]]:
    """An engine with the folder's own weights, no Megatron involved, and the checksum of these weights."""
    folder, architecture = HfFolder(path), read_architecture(path)
    folder.validate(architecture)
    with running_engine(path, dtype, section, architecture, None, num_threads) as engine:
        checksum = engine.load_weights(FolderExport(folder, architecture, DTYPES[dtype]), 0)
        yield engine, checksum
