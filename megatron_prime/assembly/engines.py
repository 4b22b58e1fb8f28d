"""Rollout engines from a configuration: which one, built from what, and where this rank stands among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from megatron_prime import collectives
from megatron_prime.config.engine_checks import NO_EXPERTS
from megatron_prime.config.schema import RolloutSection, VllmSection
from megatron_prime.data.tokenizer import end_token_ids, load_tokenizer
from megatron_prime.errors import ConfigError
from megatron_prime.interfaces import Engine
from megatron_prime.mcore.dtypes import DTYPES
from megatron_prime.mcore.parallel import Layout
from megatron_prime.rollout.embedded.engine import TransformersEngine
from megatron_prime.rollout.vllm.trainer.beside import VllmEngine, VllmSetup
from megatron_prime.rollout.vllm.trainer.beside_buckets import StreamedVllmEngine
from megatron_prime.rollout.vllm.trainer.process import EngineParent
from megatron_prime.rollout.vllm.wire.messages import EngineOptions
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.stream import ParallelGroups

if TYPE_CHECKING:
    from megatron_prime.rollout.vllm.trainer.remote import ServersSetup


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
    shared: dict[str, Any] = {
        "end_token_ids": end_token_ids(tokenizer, folder),
        "decode": lambda ids: str(tokenizer.decode(list(ids))),
    }
    if section.engine == "vllm" and architecture.experts is not None:
        raise ConfigError(f"the rollout engine: {NO_EXPERTS}")
    engine: Engine
    if section.engine == "vllm" and section.vllm.servers:
        # Most runs need no HTTP client.
        from megatron_prime.rollout.vllm.trainer.remote import VllmServers

        engine = VllmServers(servers_setup(section.vllm, architecture, layout, **shared))
    elif section.engine == "vllm":
        if section.vllm.kv_cache_gib is None and not torch.cuda.is_available():
            raise ConfigError("rollout.vllm.kv_cache_gib: null needs a GPU; on a CPU give the memory in GiB")
        setup = vllm_setup(folder, dtype, section.vllm, architecture, layout, num_threads, **shared)
        if section.vllm.in_ranks:
            from megatron_prime.rollout.vllm.trainer.in_ranks import VllmInRanks

            engine = VllmInRanks(in_ranks(setup))
        else:
            engine = engine_beside(setup)
    else:
        device = layout.device if layout else "cuda" if torch.cuda.is_available() else "cpu"
        engine = TransformersEngine(
            folder, dtype=DTYPES[dtype], device=device, max_batch_size=section.max_batch_size, **shared
        )
    with closing(engine):
        yield engine


def engine_beside(setup: VllmSetup, parent: EngineParent | None = None) -> VllmEngine:
    """The engine in a process beside the trainer that gets its weights as the setup says."""
    return (StreamedVllmEngine if setup.options.transfer == "ipc" else VllmEngine)(setup, parent)


def vllm_setup(
    folder: str,
    dtype: str,
    section: VllmSection,
    architecture: ModelArchitecture,
    layout: Layout | None,
    num_threads: int,
    *,
    end_token_ids: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
) -> VllmSetup:
    """Where this rank stands among the engines, and what they are built from."""
    groups = layout.export_groups() if layout else ParallelGroups()
    first_device = (layout.device.index if layout else None) or 0
    return VllmSetup(
        options=engine_options(folder, dtype, section, architecture),
        bucket_bytes=section.bucket_mib * 2**20,
        vocab_size=architecture.vocab_size,
        end_token_ids=end_token_ids,
        decode=decode,
        engine_index=layout.copy_index if layout else 0,
        num_engines=layout.num_copies if layout else 1,
        is_leader=groups.stage_rank == 0 and groups.pp_rank == 0,
        num_threads=section.num_threads or num_threads * groups.stage_size * groups.pp_size,
        device_ids=tuple(range(first_device, first_device + section.tensor_parallel_size))
        if torch.cuda.is_available()
        else (),
        timeout_seconds=section.timeout_seconds,
        max_restarts=section.max_restarts,
        verify_refit=section.verify_refit,
        abort_after_seconds=section.abort_after_seconds,
    )


def in_ranks(setup: VllmSetup) -> VllmSetup:
    """The same for engines that consecutive ranks are the workers of."""
    size = setup.options.tensor_parallel_size
    return replace(
        setup,
        engine_index=collectives.rank() // size,
        num_engines=collectives.world_size() // size,
        is_leader=collectives.rank() % size == 0,
    )


def engine_options(folder: str, dtype: str, section: VllmSection, architecture: ModelArchitecture) -> EngineOptions:
    """What one engine is built from, wherever it runs."""
    return EngineOptions(
        folder=folder,
        dtype=dtype,
        tensor_parallel_size=section.tensor_parallel_size,
        max_model_len=section.max_model_len or architecture.max_position_embeddings,
        max_num_seqs=section.max_num_seqs,
        kv_cache_bytes=None if section.kv_cache_gib is None else int(section.kv_cache_gib * 2**30),
        gpu_memory_utilization=section.gpu_memory_utilization,
        pack_weights=section.pack_weights,
        transfer=_transfer_beside(section),
    )


def _transfer_beside(section: VllmSection) -> Literal["shared_memory", "ipc"]:
    if section.transfer == "ipc" or (section.transfer == "auto" and torch.cuda.is_available() and not section.in_ranks):
        return "ipc"
    return "shared_memory"


def servers_setup(
    section: VllmSection,
    architecture: ModelArchitecture,
    layout: Layout | None,
    *,
    end_token_ids: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
) -> ServersSetup:
    """Which servers there are and whether this rank sends weights to them."""
    from megatron_prime.rollout.vllm.trainer.remote import ServersSetup

    on_gpu = torch.cuda.is_available()
    if section.transfer == "nccl" and not on_gpu:
        raise ConfigError("rollout.vllm.transfer: nccl needs a GPU on this host; use gloo")
    by_nccl = on_gpu and section.transfer != "gloo"
    return ServersSetup(
        urls=tuple(url.rstrip("/") for url in section.servers),
        vocab_size=architecture.vocab_size,
        max_model_len=section.max_model_len or architecture.max_position_embeddings,
        max_num_seqs=section.max_num_seqs,
        end_token_ids=end_token_ids,
        decode=decode,
        holds_copy=layout is None or layout.copy_index == 0,
        transfer="nccl" if by_nccl else "gloo",
        device=torch.device("cuda", torch.cuda.current_device()) if by_nccl else torch.device("cpu"),
        bucket_bytes=section.bucket_mib * 2**20,
        timeout_seconds=section.timeout_seconds,
        max_restarts=section.max_restarts,
        verify_refit=section.verify_refit,
        abort_after_seconds=section.abort_after_seconds,
    )


@contextmanager
def loaded_engine(path: str, dtype: str, section: RolloutSection, num_threads: int) -> Iterator[tuple[Engine, str]]:
    """An engine with the folder's own weights, no Megatron involved, and the checksum of these weights."""
    folder, architecture = HfFolder(path), read_architecture(path)
    folder.validate(architecture)
    with running_engine(path, dtype, section, architecture, None, num_threads) as engine:
        checksum = engine.load_weights(FolderExport(folder, architecture, DTYPES[dtype]), version=0)
        yield engine, checksum
