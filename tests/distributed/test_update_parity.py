"""One optimizer step ends in the same weights at every layout: qk norms, tied and untied heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bf16 import examples
from tiny_models import save_tiny_model

from megatron_prime.config.schema import MicroBatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.prime_roles import SftRole
from megatron_prime.mcore.role import RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

FAMILIES = ("qwen2", "qwen3", "llama")
LEARNING_RATE = 1e-2
# Adam's first step divides each gradient by itself; a large epsilon keeps the size of the gradient in it.
OPTIMIZER = OptimizerSection(lr=LEARNING_RATE, adam_eps=1e-2, clip_grad=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


def update(folders: dict[str, Path], parallel: ParallelSection) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Gradient norm and all weights after one step, by family."""
    results = {}
    with parallel_layout(parallel, seed=1) as layout:
        for family, folder in folders.items():
            setup = RoleSetup(
                architecture=read_architecture(folder),
                model=ModelSection(path=str(folder), make_vocab_size_divisible_by=16),
                parallel=parallel,
                micro_batch=MicroBatchSection(micro_batch_tokens=30),
                layout=layout,
            )
            role = SftRole(setup, OPTIMIZER, num_optimizer_steps=1)
            role.load_hf(HfFolder(folder))
            norm = role.update(examples())["grad_norm"]
            results[family] = norm, {name: tensor.clone() for name, tensor in role.export_weights()}
    return results


@pytest.fixture(scope="module")
def expected(gloo_pool, folders) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    return gloo_pool.run(1, update, folders, ParallelSection())[0]


def test_the_step_moves_every_weight(folders, expected) -> None:
    for family, (_, weights) in expected.items():
        start = HfFolder(folders[family])
        for name, tensor in weights.items():
            before = start.fetch(name, (slice(None),) * tensor.dim())
            moved = (tensor - before).abs().max()
            assert moved > 1e-4, (family, name)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"use_distributed_optimizer": True},
        {"context_parallel_size": 2},
    ],
    ids=["tp2", "tp2_sequence_parallel", "pp2", "dp2_distributed_optimizer", "cp2"],
)
def test_same_weights_after_one_step(gloo_pool, folders, expected, sizes) -> None:
    for results in gloo_pool.run(2, update, folders, ParallelSection(world_size=2, **sizes)):
        for family, (norm, weights) in results.items():
            wanted_norm, wanted = expected[family]
            assert norm == pytest.approx(wanted_norm, rel=1e-5), family
            assert weights.keys() == wanted.keys()
            for name, tensor in weights.items():
                assert (tensor - wanted[name]).abs().max() < 1e-5, (family, name)
