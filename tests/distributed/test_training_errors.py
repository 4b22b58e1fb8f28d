"""What ends a run ends it on every rank, with the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_rows import ScaledLoss, make_rows
from tiny_models import role_setup, save_tiny_model

from megatron_prime.config.schema import OptimizerSection, ParallelSection
from megatron_prime.errors import TrainingError
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import TrainableRole
from megatron_prime.weights.hf_folder import HfFolder


def errors(folder: Path, dtype: Any, distributed: bool) -> list[str]:
    """Messages of a mini-batch of one row, of an infinite gradient norm and of a loss that is no number."""
    parallel = ParallelSection(world_size=2, use_distributed_optimizer=distributed)
    messages = []
    with parallel_layout(parallel, seed=1) as layout:
        setup = role_setup(folder, dtype, parallel, layout)
        role = TrainableRole(setup, OptimizerSection(lr=1e-3), num_optimizer_steps=1)
        role.load_hf(HfFolder(folder))
        rows = make_rows()
        # The loss of 1e30 is finite, and so are its gradients; the sum of their squares is not.
        before = {name: weight.clone() for name, weight in role.local_weights().items()}
        for selected, scale in ((range(1), 1.0), (range(7), torch.nan), (range(7), 1e30)):
            with pytest.raises(TrainingError) as caught:
                role.optimizer_step(rows, selected, ScaledLoss(scale))
            messages.append(str(caught.value))
        # All of it was seen before the optimizer changed anything.
        assert all(torch.equal(weight, before[name]) for name, weight in role.local_weights().items())
    return messages


@pytest.mark.parametrize(("dtype", "distributed"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_every_rank_raises_the_same(gloo_pool, tmp_path: Path, dtype: str, distributed: bool) -> None:
    first, second = gloo_pool.run(2, errors, save_tiny_model("llama", tmp_path / "llama"), dtype, distributed)
    assert first == second
    empty, undefined, infinite = first
    assert empty.startswith("1 responses cannot be shared by 2 data-parallel ranks")
    assert undefined.startswith("not finite: loss nan") and "grad_norm nan" in undefined
    assert infinite.startswith("not finite: grad_norm inf; no weight has changed")
