"""A run that goes on from a checkpoint equals one that never stopped: bit for bit, or within rounding elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_task import prime_config, read_curve, run_prime

SAVED = {"checkpoint": {"every_steps": 2, "keep_last": 5}}
NUM_STEPS = 4


def test_going_on_is_bit_exact(gloo_pool, start: str, tmp_path: Path) -> None:
    layout = {"parallel": {"world_size": 2, "use_distributed_optimizer": True}, "model": {"dtype": "bfloat16"}}
    config = prime_config(start, str(tmp_path), "run", **layout, **SAVED)
    config["run"]["num_steps"] = NUM_STEPS
    gloo_pool.run(2, run_prime, config)
    whole = read_curve(str(tmp_path), "run")
    weights = load_file(tmp_path / "run" / "hf" / "model.safetensors")

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    gloo_pool.run(2, run_prime, config)
    assert read_curve(str(tmp_path), "run") == whole
    again = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)


def test_going_on_at_another_layout_is_the_same_run(gloo_pool, start: str, tmp_path: Path) -> None:
    config = prime_config(start, str(tmp_path), "run", parallel={"pipeline_model_parallel_size": 2}, **SAVED)
    config["run"]["num_steps"] = NUM_STEPS
    config["parallel"]["world_size"] = 2
    gloo_pool.run(2, run_prime, config)
    whole = read_curve(str(tmp_path), "run")

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    config["parallel"] = {"world_size": 2, "use_distributed_optimizer": True}
    gloo_pool.run(2, run_prime, config)
    actual = read_curve(str(tmp_path), "run")
    assert [row["step"] for row in actual] == list(range(NUM_STEPS + 1))
    for expected, row in zip(whole, actual, strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("/max_imbalance"):  # how evenly the ranks share the work is up to the layout
                continue
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (row["step"], name)
