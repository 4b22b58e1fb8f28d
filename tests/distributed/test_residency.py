"""A model that gives its memory away between steps ends with the same bits as one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_parity import make_rows
from test_training_errors import scaled
from tiny_models import save_tiny_model

from megatron_prime.config.schema import MicroBatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.residency import ParkedStorages
from megatron_prime.mcore.role import RoleSetup, TrainableRole
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder


def resident_bytes(role: TrainableRole) -> tuple[int, int]:
    """Of weights, and of gradient buffers."""
    weights = {p.data.untyped_storage() for chunk in role.chunks for p in chunk.parameters()}
    gradients = [buffer.grad_data.untyped_storage() for ddp in role.wrapped for buffer in ddp.buffers]
    return sum(s.nbytes() for s in weights), sum(s.nbytes() for s in gradients)


def trained_weights(folder: Path, dtype: Any, distributed: bool, offload: Any) -> dict[str, torch.Tensor]:
    """After three optimizer steps with a sleep before and after each, and scores in between."""
    parallel = ParallelSection(world_size=2, use_distributed_optimizer=distributed, offload_idle=offload)
    with parallel_layout(parallel, seed=1) as layout:
        setup = RoleSetup(
            architecture=read_architecture(folder),
            model=ModelSection(path=str(folder), dtype=dtype, make_vocab_size_divisible_by=16),
            parallel=parallel,
            micro_batch=MicroBatchSection(micro_batch_tokens=50),
            layout=layout,
        )
        role = TrainableRole(setup, OptimizerSection(lr=1e-2), num_optimizer_steps=3)
        role.load_hf(HfFolder(folder))
        rows = make_rows()
        for _ in range(3):
            role.sleep()
            weights, gradients = resident_bytes(role)
            assert (weights == 0, gradients == 0) == (offload == "all", offload != "none")
            role.wake(training=True)
            role.optimizer_step(rows, range(7), scaled(0.1))
            role.sleep()
            role.sleep()
            role.wake()
            assert (resident_bytes(role)[1] == 0) == (offload != "none")
            scores = role.logprobs(rows)
        role.sleep()
        role.wake(training=True)
        return {name: weight.clone() for name, weight in role.local_weights().items()} | {"scores": scores}


@pytest.mark.parametrize(("dtype", "distributed"), [("float32", False), ("bfloat16", True)])
def test_sleeping_changes_no_bit(gloo_pool, tmp_path: Path, dtype: str, distributed: bool) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "qwen2")
    expected, gradients, everything = (
        gloo_pool.run(2, trained_weights, folder, dtype, distributed, offload)[0]
        for offload in ("none", "gradients", "all")
    )
    for found in (gradients, everything):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_views_keep_their_values_and_share_their_memory() -> None:
    whole = torch.arange(10.0)
    parts = [whole[:4], whole[4:].view(2, 3)]
    parked = ParkedStorages()
    parked.park(parts)
    assert parked.is_parked and whole.untyped_storage().nbytes() == 0
    parked.restore()
    assert not parked.is_parked and torch.equal(whole, torch.arange(10.0))
    parts[1][0, 0] = -1
    assert whole[4] == -1
