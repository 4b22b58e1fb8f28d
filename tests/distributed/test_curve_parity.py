"""The training curve does not depend on the layout, on packing or on the micro-batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_task import prime_config, read_curve, run_prime

VARIANTS = {
    "tp2": {"parallel": {"world_size": 2, "tensor_model_parallel_size": 2}},
    "pp2": {"parallel": {"world_size": 2, "pipeline_model_parallel_size": 2}},
    "dp2": {"parallel": {"world_size": 2}},
    "cp2": {"parallel": {"world_size": 2, "context_parallel_size": 2}},
    "size1": {"micro_batch": {"micro_batch_tokens": None, "micro_batch_size": 1}},
    "size2": {"micro_batch": {"micro_batch_tokens": None, "micro_batch_size": 2}},
    "size4_unpacked": {"micro_batch": {"micro_batch_tokens": None, "micro_batch_size": 4, "packed": False}},
    "small_head_chunks": {"micro_batch": {"micro_batch_tokens": 200}, "head": {"workspace_mib": 0.004}},
    # PRM and reference alike: before the PRM has learned, what tells them apart is rounding alone.
    "budgets": {
        "policy": {"micro_batch_tokens": 150},
        "prm": {"micro_batch_tokens": 90},
        "reference": {"micro_batch_tokens": 90},
    },
    "recompute": {"model": {"recompute_granularity": "full"}},
}
OPTIONS = {
    "rollout": {"temperature": 0.9},
    "reference": {"source": "policy"},
    "prm": {"loss": "pairwise", "update": "before"},
    "advantage": {"process_baseline": "group", "process_scale": "rms"},
    "policy": {"loss_normalization": "sequence", "num_epochs": 2, "optimizer": {"lr": 5e-5}},
}
"""Much that the reference run leaves at its default, at once; two epochs are twice the steps, of half the size."""
# The order of float32 sums differs, and three steps of Adam carry the difference on.
TOLERANCE = 1e-5
# A norm of sums over the whole batch and the extremes of a ratio are larger numbers than a loss.
RELATIVE = ("policy/grad_norm", "prm/grad_norm", "policy/max_ratio")
# The largest of some thousand rounding differences between engine and trainer is no function of the layout at all.
NOISE, LARGEST_NOISE = ("rollout/logprob_gap_max",), 1e-4


@pytest.fixture(scope="module")
def reference(gloo_pool, start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    gloo_pool.run(1, run_prime, prime_config(start, str(directory), "reference"))
    return directory


def test_the_reference_learns_from_both_sources(reference: Path) -> None:
    _before, first, *later = read_curve(str(reference), "reference")
    assert first["advantage/process_share"] == 0.0  # the PRM starts as a copy of the reference
    for row in later:
        assert 0.1 < row["rollout/accuracy"] < 0.9
        assert row["advantage/outcome_share"] > 0.05
        assert row["advantage/process_share"] > 0.05
        assert row["policy/grad_norm"] > 1e-3
        assert row["prm/grad_norm"] > 1e-3


def assert_same_run(directory: Path, reference: str, name: str) -> None:
    expected, actual = read_curve(str(directory), reference), read_curve(str(directory), name)
    assert len(expected) == len(actual) == 4  # the evaluation before the first step, and three steps
    for step, (wanted, found) in enumerate(zip(expected, actual, strict=True)):
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            if key.endswith("/max_imbalance"):  # how ranks are loaded is the layout's
                assert 1 <= found[key] < 1.5
                continue
            scale = max(1.0, abs(value)) if value is not None and key in RELATIVE else 1.0
            tolerance = LARGEST_NOISE if key in NOISE else TOLERANCE * scale
            assert found[key] == pytest.approx(value, abs=tolerance), (step, key)
    weights = [load_file(directory / run / "hf" / "model.safetensors") for run in (reference, name)]
    for key, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][key], rtol=0, atol=2e-5), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_curve(gloo_pool, start: str, reference: Path, variant: str) -> None:
    sections = VARIANTS[variant]
    world_size = sections.get("parallel", {}).get("world_size", 1)
    gloo_pool.run(world_size, run_prime, prime_config(start, str(reference), variant, **sections))
    assert_same_run(reference, "reference", variant)


def options_config(start: str, directory: Path, name: str, **parallel: int) -> dict[str, Any]:
    config = prime_config(start, str(directory), name, parallel=parallel)
    return {section: values | OPTIONS.get(section, {}) for section, values in (OPTIONS | config).items()}


@pytest.fixture(scope="module")
def reference_with_options(gloo_pool, start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs_with_options")
    gloo_pool.run(1, run_prime, options_config(start, directory, "reference"))
    return directory


@pytest.mark.parametrize("variant", ["tp2", "dp2"])
def test_same_curve_with_options(gloo_pool, start: str, reference_with_options: Path, variant: str) -> None:
    layout = VARIANTS[variant]["parallel"]
    gloo_pool.run(2, run_prime, options_config(start, reference_with_options, variant, **layout))
    assert_same_run(reference_with_options, "reference", variant)
    for row in read_curve(str(reference_with_options), "reference")[2:]:
        assert row["prm/grad_norm"] > 1e-3
        assert row["advantage/process_share"] > 0.05
