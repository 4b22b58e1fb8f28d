"""Models with experts: log-probs equal transformers', weights survive every layout and both formats bit for bit, and a
run goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron_files import megatron_loads, megatron_saves
from parity_rows import TEMPERATURE, expected_logprobs, make_rows
from safetensors.torch import load_file
from small_task import make_start, prime_config, read_curve, run_prime
from tiny_models import FAMILIES_WITH_EXPERTS, save_tiny_model

from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.kernels import HeadOptions
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.conversion import to_hf, to_megatron
from megatron_prime.weights.conversion_plan import Cut
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.shards import cut

LAYOUTS = {
    "tp1": ParallelSection(),
    "ep2": ParallelSection(world_size=2, expert_model_parallel_size=2),
    "tp2": ParallelSection(world_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelSection(world_size=2, pipeline_model_parallel_size=2),
    "tp2_ep2": ParallelSection(
        world_size=2, tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True
    ),
    "tp2_dp2_ep4": ParallelSection(
        world_size=4, tensor_model_parallel_size=2, expert_model_parallel_size=4, sequence_parallel=True
    ),
    "pp2_cp2_ep2": ParallelSection(
        world_size=4, pipeline_model_parallel_size=2, context_parallel_size=2, expert_model_parallel_size=2
    ),
}
CONVERTED = ("ep2", "tp2_ep2", "pp2_cp2_ep2")
"""Where Megatron's checkpoints are compared with the converter's."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES_WITH_EXPERTS}


@dataclass(frozen=True)
class Found:
    """What one rank has of one family."""

    scores: list[torch.Tensor]
    """Log-probs, packed and padded."""
    exported: dict[str, torch.Tensor]
    """Whole tensors."""
    sliced: dict[str, torch.Tensor]
    """Put together from all ranks' slices of this rank's copy of the model."""
    reloaded: dict[str, torch.Tensor]
    """Exported after a load from a converted checkpoint, where that is tried."""


@on_megatron_platform
def exchange(role: ModelRole, converted: Path, own: Path) -> None:
    """Has Megatron write a checkpoint of the role, then read the converter's into it, from a spoiled start."""
    if torch.distributed.get_rank() == 0:
        own.mkdir()
    torch.distributed.barrier()
    megatron_saves(role.chunks[0], own)
    for weight in role.local_weights().values():
        weight.fill_(torch.nan)
    megatron_loads(role.chunks[0], converted)


def sliced_weights(role: ModelRole) -> dict[str, torch.Tensor]:
    export = role.export_weights()
    result = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape, dtype in export.tensors()}
    parts = [(part.name, part.ranges, part.values.clone()) for part in export.slices()]
    for part in (part for parts in export.gather(parts) for part in parts):
        cut(result[part[0]], part[1]).copy_(part[2])
    return result


def run_layout(folders: dict[str, Path], root: Path, layout: str) -> dict[str, Found]:
    parallel = LAYOUTS[layout]
    results = {}
    with parallel_layout(parallel, seed=1) as running:
        for family, folder in folders.items():
            scores = []
            for packed in (True, False):
                setup = RoleSetup(
                    architecture=read_architecture(folder),
                    model=ModelSection(path=str(folder)),
                    parallel=parallel,
                    micro_batch=MicroBatchSection(packed=packed, micro_batch_tokens=50),
                    head=HeadOptions(workspace_bytes=4096),
                    layout=running,
                )
                role = ModelRole(setup)
                role.load_hf(HfFolder(folder))
                scores.append(role.logprobs(make_rows(), temperature=TEMPERATURE))
            exported = {name: tensor.clone() for name, tensor in role.export_weights()}
            sliced = sliced_weights(role)
            reloaded = {}
            if layout in CONVERTED:
                exchange(role, root / family, root / f"{family}_{layout}")
                reloaded = {name: tensor.clone() for name, tensor in role.export_weights()}
            results[family] = Found(scores, exported, sliced, reloaded)
    return results


def same(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> bool:
    return found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron checkpoints made without Megatron, cut for a layout that no test has."""
    root = tmp_path_factory.mktemp("converted")
    for family, folder in folders.items():
        to_megatron(folder, root / family, cut=Cut(tp_size=4, pp_size=2))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_weights(gloo_pool, folders, converted: Path, layout: str) -> None:
    for results in gloo_pool.run(LAYOUTS[layout].world_size, run_layout, folders, converted, layout):
        for family, found in results.items():
            expected = expected_logprobs(folders[family], make_rows())
            saved = load_file(folders[family] / "model.safetensors")
            assert all((score - expected).abs().max() < 1e-4 for score in found.scores), family
            assert same(found.exported, saved), family
            assert same(found.sliced, saved), family
            assert layout not in CONVERTED or same(found.reloaded, saved), family
    for family, folder in folders.items() if layout in CONVERTED else ():
        back = converted / f"{family}_{layout}_back"
        to_hf(converted / f"{family}_{layout}", back, like=folder)
        assert same(load_file(back / "model.safetensors"), load_file(folder / "model.safetensors")), family


SMALL_EXPERTS = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}


def make_start_with_experts(root: str) -> str:
    return make_start(root, num_steps=80, **SMALL_EXPERTS)


def test_a_run_goes_on_from_its_checkpoint(gloo_pool, tmp_path: Path) -> None:
    start = gloo_pool.run(1, make_start_with_experts, str(tmp_path / "start"))[0]
    parallel = {"world_size": 2, "expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    saved, unevaluated = {"every_steps": 1, "keep_last": 3}, {"num_prompts": 0}
    config = prime_config(start, str(tmp_path), "run", parallel=parallel, checkpoint=saved, evaluation=unevaluated)
    config["run"]["num_steps"] = 2
    gloo_pool.run(2, run_prime, config)
    whole = read_curve(str(tmp_path), "run")
    weights = load_file(tmp_path / "run" / "hf" / "model.safetensors")

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    gloo_pool.run(2, run_prime, config)
    assert read_curve(str(tmp_path), "run") == whole
    assert same(load_file(tmp_path / "run" / "hf" / "model.safetensors"), weights)

    # Stored by expert, moments too: the same run where tensor-parallel ranks hold every expert.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    config["parallel"] = {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    gloo_pool.run(2, run_prime, config)
    for expected, row in zip(whole, read_curve(str(tmp_path), "run"), strict=True):
        for name, value in expected.items():
            if name.endswith("max_imbalance"):  # of data-parallel shards, of which there is one now
                continue
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (row["step"], name)
