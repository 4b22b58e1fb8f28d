"""A Megatron checkpoint written at one layout is read at any other, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from megatron_prime.config.schema import ParallelSection
from megatron_prime.mcore import convert
from megatron_prime.mcore.parallel import parallel_layout

SIZES = {"tp1": (1, 1), "pp2": (1, 2), "tp4": (4, 1), "tp2_pp2": (2, 2)}
FAMILIES = {"tied": "qwen3", "untied": "llama"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(family, root / kind) for kind, family in FAMILIES.items()}


def convert_at(layout: str, to_megatron: bool, paths: list[tuple[Path, Path]]) -> None:
    """Converts every (source, target) at one layout."""
    tensor, pipeline = SIZES[layout]
    parallel = ParallelSection(
        world_size=tensor * pipeline, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    with parallel_layout(parallel, seed=1) as running:
        for source, target in paths:
            if to_megatron:
                convert.to_megatron(source, target, dtype=None, parallel=parallel, layout=running)
            else:
                convert.to_hf(source, target, like=None, dtype=None, parallel=parallel, layout=running)


@pytest.mark.parametrize(("written", "read"), [("tp2_pp2", ("tp1", "pp2", "tp4")), ("tp1", ("tp2_pp2",))])
def test_round_trip(gloo_pool, folders, tmp_path: Path, written: str, read: tuple[str, ...]) -> None:
    def run(layout: str, to_megatron: bool, paths: list[tuple[Path, Path]]) -> None:
        tensor, pipeline = SIZES[layout]
        gloo_pool.run(tensor * pipeline, convert_at, layout, to_megatron, paths)

    run(written, True, [(folder, tmp_path / kind) for kind, folder in folders.items()])
    for layout in read:
        run(layout, False, [(tmp_path / kind, tmp_path / f"{kind}_{layout}") for kind in folders])
        for kind, folder in folders.items():
            wanted, found = (load_file(path / "model.safetensors") for path in (folder, tmp_path / f"{kind}_{layout}"))
            assert wanted.keys() == found.keys()
            assert ("lm_head.weight" in wanted) == (kind == "untied")
            assert all(torch.equal(wanted[name], found[name]) for name in wanted), (kind, layout)
