"""Parameters and bytes of models, beside published numbers and sums over shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from recipes import PUBLISHED_PARAMETERS, SHAPES, recipe

from megatron_prime.planner import footprint
from megatron_prime.planner.hardware import PROFILES
from megatron_prime.planner.plan import make_plan
from megatron_prime.weights.architecture import ExpertLayers, read_architecture
from megatron_prime.weights.hf_folder import expected_shapes


@pytest.mark.parametrize("shape", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(shape: str) -> None:
    assert footprint.num_parameters(read_architecture(SHAPES / shape)) == PUBLISHED_PARAMETERS[shape]


@pytest.mark.parametrize("shared", [None, 512])
def test_experts_are_counted(shared: int | None) -> None:
    experts = ExpertLayers(
        num_experts=128, router_topk=8, normalize_weights=True, ffn_hidden_size=768, shared_ffn_hidden_size=shared
    )
    dense = read_architecture(SHAPES / "qwen3-8b")
    family = "qwen2_moe" if shared else "qwen3_moe"
    architecture = replace(dense, family=family, experts=experts)
    total = sum(math.prod(size) for size in expected_shapes(architecture).values())
    assert footprint.num_parameters(architecture) == total
    chosen = replace(experts, num_experts=8)
    router = 120 * architecture.hidden_size * architecture.num_layers
    assert footprint.active_parameters(architecture) - router == footprint.num_parameters(
        replace(architecture, experts=chosen)
    )

    config, _ = recipe("prime_qwen2.5_72b", "qwen3-8b", "parallel.tensor_model_parallel_size=1")
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), pipeline=1, tensor=1)
    whole, shared_out = (footprint.stage_parameters(architecture, replace(layout, expert=n), 0) for n in (1, 8))
    matrices = 3 * architecture.hidden_size * 768 * 128 * architecture.num_layers
    assert whole - shared_out == matrices * 7 // 8


@pytest.mark.parametrize("shape", PUBLISHED_PARAMETERS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (4, 2)])
def test_stages_hold_the_whole_model(shape: str, tensor: int, pipeline: int) -> None:
    architecture = read_architecture(SHAPES / shape)
    config, _ = recipe("prime_qwen2.5_72b", shape)
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), tensor=tensor, pipeline=pipeline)
    held = tensor * sum(footprint.stage_parameters(architecture, layout, stage) for stage in range(pipeline))
    padding = 2 * (footprint.vocabulary_rows(architecture, layout) * tensor - architecture.vocab_size)
    norms = (tensor - 1) * architecture.hidden_size * (2 * architecture.num_layers + 1)
    if architecture.qk_layernorm:
        norms += (tensor - 1) * 2 * architecture.kv_channels * architecture.num_layers
    assert held == footprint.num_parameters(architecture) + padding * architecture.hidden_size + norms


def test_bytes_per_parameter_are_those_of_mixed_precision() -> None:
    architecture = read_architecture(SHAPES / "qwen2.5-32b")
    config, _ = recipe("prime_qwen2.5_32b", "qwen2.5-32b")
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), data=1, distributed_optimizer=False)
    trained = footprint.model_bytes(architecture, layout, 0, trained=True)
    # Two of weights, four of gradients, twelve of Adam with float32 masters.
    assert trained.total == 18 * footprint.stage_parameters(architecture, layout, 0)
    sharded = footprint.model_bytes(architecture, replace(layout, data=4, distributed_optimizer=True), 0, trained=True)
    assert sharded.total == 9 * footprint.stage_parameters(architecture, layout, 0)
    assert footprint.model_bytes(architecture, layout, 0, trained=False).total * 9 == trained.total


def test_fp8_copies_of_the_layers_are_counted() -> None:
    config, architecture = recipe("prime_qwen2.5_72b", "qwen2.5-32b", "model.fp8=hybrid")
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), tensor=2, pipeline=1, item_bytes=2)
    a = architecture
    tables = 2 * footprint.vocabulary_rows(a, layout) * a.hidden_size
    small = a.hidden_size * (2 * a.num_layers + 1) + a.num_layers * (a.num_attention_heads + 16) * a.kv_channels // 2
    matrices = footprint.stage_parameters(a, layout, 0) - tables - small
    assert footprint.fp8_copy_bytes(a, layout, training=False) == matrices
    assert footprint.fp8_copy_bytes(a, layout, training=True) == 2 * matrices
    assert footprint.fp8_copy_bytes(a, replace(layout, fp8=False), training=True) == 0

    def copies(offload: str) -> dict[str, list[str]]:
        config, _ = recipe("prime_qwen2.5_72b", "qwen2.5-32b", "model.fp8=hybrid", f"parallel.offload_idle={offload}")
        phases = make_plan(config, architecture, PROFILES["h100"]).phases
        return {phase.name: [part for part in phase.parts if part.endswith("FP8 copies")] for phase in phases}

    assert all(len(found) == 3 for found in copies("none").values())
    given_away = copies("all")
    assert given_away["rollout"] == []
    assert given_away["policy_update"] == ["policy FP8 copies"]
