"""A run that goes on from a checkpoint equals one that never stopped, at the layouts and precisions of the recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_task import make_start, prime_config, read_curve, run_prime

LAYOUTS = {
    "pp2_tied_head": {"parallel": {"world_size": 2, "pipeline_model_parallel_size": 2}},
    "bf16_dp2_distributed_optimizer": {
        "parallel": {"world_size": 2, "use_distributed_optimizer": True},
        "model": {"dtype": "bfloat16"},
    },
    "bf16_tp2_sequence_parallel": {
        "parallel": {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        "model": {"dtype": "bfloat16"},
    },
}


@pytest.fixture(scope="module")
def start(gloo_pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    return gloo_pool.run(1, make_start, str(tmp_path_factory.mktemp("start")))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_going_on_is_bit_exact(gloo_pool, start: str, tmp_path: Path, layout: str) -> None:
    sections = LAYOUTS[layout] | {"checkpoint": {"every_steps": 2, "keep_last": 5}}
    config = prime_config(start, str(tmp_path), "run", **sections)
    config["run"]["num_steps"] = 4
    gloo_pool.run(2, run_prime, config)
    whole = read_curve(str(tmp_path), "run")
    weights = load_file(tmp_path / "run" / "hf" / "model.safetensors")

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    gloo_pool.run(2, run_prime, config)
    assert read_curve(str(tmp_path), "run") == whole
    again = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)
