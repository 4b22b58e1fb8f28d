"""Megatron at any layout reads what the converter writes, and the converter what Megatron writes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_files import megatron_loads, megatron_saves
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.export import export_hf
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.conversion import to_hf, to_megatron
from megatron_prime.weights.conversion_plan import Cut
from megatron_prime.weights.hf_folder import HfFolder

SIZES = {"tp1": (1, 1), "pp2": (1, 2), "tp4": (4, 1), "tp2_pp2": (2, 2)}
FAMILIES = {"tied": "qwen3", "untied": "llama"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(family, root / kind) for kind, family in FAMILIES.items()}


def megatron_at(layout: str, writes: bool, paths: list[tuple[Path, Path, Path]]) -> None:
    """Has Megatron itself write a checkpoint of, or read one into, the model of every (folder, checkpoint, target)."""
    tensor, pipeline = SIZES[layout]
    parallel = ParallelSection(
        world_size=tensor * pipeline, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    with parallel_layout(parallel, seed=1) as running:
        for folder, checkpoint, target in paths:
            setup = RoleSetup(
                architecture=read_architecture(folder),
                model=ModelSection(path=str(folder)),
                parallel=parallel,
                micro_batch=MicroBatchSection(micro_batch_size=1),
                layout=running,
            )
            _write_or_read(ModelRole(setup), writes, folder, checkpoint, target)


@on_megatron_platform
def _write_or_read(role: ModelRole, writes: bool, folder: Path, checkpoint: Path, target: Path) -> None:
    if writes:
        role.load_hf(HfFolder(folder))
        megatron_saves(role.chunks[0], checkpoint)
    else:
        megatron_loads(role.chunks[0], checkpoint)
        export_hf(role, target, folder)


def same_weights(folder: Path, target: Path) -> bool:
    wanted, found = (load_file(path / "model.safetensors") for path in (folder, target))
    return wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(("cut", "read"), [((2, 2), ("tp1", "pp2", "tp4")), ((1, 1), ("tp2_pp2",))])
def test_megatron_reads_a_converted_folder(gloo_pool, folders, tmp_path: Path, cut, read: tuple[str, ...]) -> None:
    for kind, folder in folders.items():
        to_megatron(folder, tmp_path / kind, cut=Cut(tp_size=cut[0], pp_size=cut[1]))
    for layout in read:
        paths = [(folder, tmp_path / kind, tmp_path / f"{kind}_{layout}") for kind, folder in folders.items()]
        tensor, pipeline = SIZES[layout]
        gloo_pool.run(tensor * pipeline, megatron_at, layout, False, paths)
        assert all(same_weights(folder, target) for folder, _, target in paths), layout


@pytest.mark.parametrize("layout", ["tp2_pp2", "tp4"])
def test_a_checkpoint_of_megatron_is_converted(gloo_pool, folders, tmp_path: Path, layout: str) -> None:
    paths = [(folder, tmp_path / kind, tmp_path / f"{kind}_back") for kind, folder in folders.items()]
    for _, checkpoint, _ in paths:
        checkpoint.mkdir()
    tensor, pipeline = SIZES[layout]
    gloo_pool.run(tensor * pipeline, megatron_at, layout, True, paths)
    for folder, checkpoint, target in paths:
        to_hf(checkpoint, target, like=folder)
        assert same_weights(folder, target)
