"""Saving and restoring on one rank: the copy that is written, what is kept, and what a failure says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_rows import ScaledLoss, make_rows
from safetensors.torch import load_file
from tiny_models import role_setup, save_tiny_model

from megatron_prime.checkpoint.manifest import committed, step_of
from megatron_prime.config.schema import CheckpointSection, OptimizerSection, ParallelSection
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.checkpoint import checkpointer
from megatron_prime.mcore.checkpoint.checkpointer import TRAINER_STATE, Checkpointer
from megatron_prime.mcore.checkpoint.resume import find_checkpoint, identity_of
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import TrainableRole
from megatron_prime.weights.hf_folder import HfFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2_untied", tmp_path_factory.mktemp("models") / "start")


@contextmanager
def roles(folder: Path, count: int = 1) -> Iterator[list[TrainableRole]]:
    parallel = ParallelSection()
    with parallel_layout(parallel, seed=1) as layout:
        setup = role_setup(folder, "float32", parallel, layout)
        made = [TrainableRole(setup, OptimizerSection(lr=1e-3), num_optimizer_steps=9) for _ in range(count)]
        made[0].load_hf(HfFolder(folder))
        yield made


def saver_of(place: Path, role: TrainableRole, folder: Path, found: Path | None = None, **section: Any) -> Checkpointer:
    return Checkpointer(place, {"model": role}, CheckpointSection(**section), {"model": str(folder)}, found)


def train(role: TrainableRole) -> float:
    return role.optimizer_step(make_rows(), range(7), ScaledLoss(-1 / 20)).metrics["loss"]


def steps_in(place: Path) -> list[int]:
    return sorted(step_of(path) for path in committed(place))


def test_a_step_made_while_files_are_written_is_not_in_them(folder: Path, tmp_path: Path, monkeypatch) -> None:
    may_write = threading.Event()
    write = checkpointer.write_chunks

    def wait_and_write(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpointer, "write_chunks", wait_and_write)
    with roles(folder, 2) as (role, fresh):
        train(role)
        saver = saver_of(tmp_path, role, folder)
        saver.save(1, {"seen": 7}, accuracy=0.5)
        assert steps_in(tmp_path) == []
        loss = train(role)
        may_write.set()
        saver.finish()
        found = find_checkpoint(tmp_path, identity_of({"model": role.architecture}, "float32"))
        restored = saver_of(tmp_path, fresh, folder, found)
        assert restored.step == 1 and restored.restore() == {"seen": 7}
        assert train(fresh) == loss


def test_the_latest_and_the_best_are_kept(folder: Path, tmp_path: Path) -> None:
    with roles(folder) as (role,):
        saver = saver_of(tmp_path, role, folder, keep_last=2, keep_best=1)
        for step, accuracy in enumerate([0.3, 0.9, 0.4, 0.5, 0.6], start=1):
            saver.save(step, {}, accuracy=accuracy, background=step % 2 == 0)
        saver.finish()
    assert steps_in(tmp_path) == [2, 4, 5]


def test_without_a_checkpoint_a_run_begins_at_step_0(folder: Path, tmp_path: Path) -> None:
    with roles(folder) as (role,):
        saver = saver_of(tmp_path, role, folder)
        assert saver.step == 0 and saver.restore() is None
        saver.check()
        saver.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_state_of_another_step_is_refused(folder: Path, tmp_path: Path) -> None:
    with roles(folder) as (role,):
        saver_of(tmp_path, role, folder).save(3, {}, background=False)
        (found,) = committed(tmp_path)
        torch.save({"step": 2, "state": {}}, found / TRAINER_STATE)
        with pytest.raises(CheckpointError, match=r"trainer\.pt is of step 2; remove the folder"):
            saver_of(tmp_path, role, folder, found).restore()


@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_keeps_the_checkpoints_before_and_leaves_no_half(
    folder: Path, tmp_path: Path, monkeypatch, background: bool
) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    with roles(folder) as (role,):
        saver = saver_of(tmp_path, role, folder, keep_last=1)
        saver.save(1, {}, background=False)
        monkeypatch.setattr(checkpointer, "write_chunks", fail)
        message = r"cannot be written: rank 0: .*No space left.* \(kept: step_0*1\)"
        with pytest.raises(CheckpointError, match=message):
            saver.save(2, {}, background=background)
            saver.finish()
        # It was told once.
        saver.finish()
    assert [step_of(path) for path in tmp_path.iterdir()] == [1]


def test_closing_only_logs_a_failure(folder: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError("gone")

    monkeypatch.setattr(checkpointer, "write_chunks", fail)
    with roles(folder) as (role,):
        saver = saver_of(tmp_path, role, folder)
        saver.save(1, {})
        saver.close()
    assert "cannot be written: rank 0: gone" in caplog.text


def test_models_are_exported_every_so_many_saves(folder: Path, tmp_path: Path) -> None:
    with roles(folder) as (role,):
        saver = saver_of(tmp_path / "checkpoints", role, folder, every_steps=1, export_every_saves=2)
        (tmp_path / "checkpoints").mkdir()
        for step in (1, 2, 3):
            saver.save(step, {}, background=False)
        weights = dict(role.export_weights())
        exported = load_file(next((tmp_path / "exports").rglob("model.safetensors")))
        assert [path.name for path in (tmp_path / "exports").iterdir()] == [f"step_{2:08}"]
        assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
