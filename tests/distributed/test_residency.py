"""A model that gives its memory away between steps ends with the same bits as one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_rows import ScaledLoss, make_rows
from tiny_models import role_setup, save_tiny_model

from megatron_prime.checkpoint.manifest import step_folder
from megatron_prime.config.schema import (
    CheckpointSection,
    OptimizerSection,
    ParallelSection,
)
from megatron_prime.mcore.checkpoint.checkpointer import Checkpointer
from megatron_prime.mcore.parallel import Layout, parallel_layout
from megatron_prime.mcore.residency import ParkedStorages, awake
from megatron_prime.mcore.role import TrainableRole
from megatron_prime.weights.hf_folder import HfFolder


def resident_bytes(role: TrainableRole) -> tuple[int, int]:
    """Of weights, and of gradient buffers."""
    weights = {p.data.untyped_storage() for chunk in role.chunks for p in chunk.parameters()}
    gradients = [buffer.grad_data.untyped_storage() for ddp in role.wrapped for buffer in ddp.buffers]
    return sum(s.nbytes() for s in weights), sum(s.nbytes() for s in gradients)


def build_role(folder: Path, dtype: Any, parallel: ParallelSection, layout: Layout) -> TrainableRole:
    setup = role_setup(folder, dtype, parallel, layout)
    role = TrainableRole(setup, OptimizerSection(lr=1e-2), num_optimizer_steps=3)
    role.load_hf(HfFolder(folder))
    return role


def trained_weights(folder: Path, dtype: Any, distributed: bool, offload: Any) -> dict[str, torch.Tensor]:
    """After three optimizer steps with a sleep before and after each, and scores in between."""
    parallel = ParallelSection(world_size=2, use_distributed_optimizer=distributed, offload_idle=offload)
    with parallel_layout(parallel, seed=1) as layout:
        role = build_role(folder, dtype, parallel, layout)
        rows = make_rows()
        for _ in range(3):
            role.sleep()
            weights, gradients = resident_bytes(role)
            assert (weights == 0, gradients == 0) == (offload == "all", offload != "none")
            role.wake(training=True)
            role.optimizer_step(rows, range(7), ScaledLoss(0.1))
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


def most_awake(folder: Path, root: Path) -> tuple[int, dict[str, bool]]:
    """How many of two models are awake at the same time while they are saved and restored, and which came back."""
    parallel = ParallelSection(world_size=2, use_distributed_optimizer=True, offload_idle="all")
    now: set[str] = set()
    numbers = [0]

    def watched(name: str, role: TrainableRole) -> TrainableRole:
        wake, sleep = role.wake, role.sleep

        def waking(*, training: bool = False) -> None:
            now.add(name)
            numbers.append(len(now))
            wake(training=training)

        def sleeping() -> None:
            now.discard(name)
            sleep()

        role.wake, role.sleep = waking, sleeping  # type: ignore[method-assign]
        return role

    def build(layout: Layout) -> dict[str, TrainableRole]:
        roles = {name: watched(name, build_role(folder, "bfloat16", parallel, layout)) for name in ("policy", "prm")}
        for role in roles.values():
            role.sleep()
        return roles

    def weights(roles: dict[str, TrainableRole]) -> dict[str, torch.Tensor]:
        found = {}
        for name, role in roles.items():
            with awake(role):
                found |= {f"{name} {key}": value.clone() for key, value in role.local_weights().items()}
        return found

    with parallel_layout(parallel, seed=1) as layout:
        roles, starts = build(layout), {"policy": str(folder), "prm": str(folder)}
        for number, role in enumerate(roles.values(), start=1):
            with awake(role):
                role.optimizer_step(make_rows(), range(7), ScaledLoss(0.1 * number))
        expected = weights(roles)
        section = CheckpointSection()
        saver = Checkpointer(root / "checkpoints", roles, section, starts, None)
        found = {}
        for step, background in ((1, True), (2, False)):
            saver.save(step, {}, background=background)
            saver.finish()
            restored = build(layout)
            checkpoint = step_folder(root / "checkpoints", step)
            assert Checkpointer(root / "checkpoints", restored, section, starts, checkpoint).restore() == {}
            back = weights(restored)
            found |= {f"{step} {name}": torch.equal(back[name], value) for name, value in expected.items()}
        assert not now
    return max(numbers), found


def test_saving_and_restoring_wake_one_model_at_a_time(gloo_pool, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "qwen2")
    number, found = gloo_pool.run(2, most_awake, folder, tmp_path)[0]
    assert number == 1
    assert len(found) > 40 and all(found.values())


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
