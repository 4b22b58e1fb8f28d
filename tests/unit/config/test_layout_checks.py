"""Layouts of models with experts."""

from types import SimpleNamespace
from typing import Any

import pytest
from model_shape import SHAPE

from megatron_prime.config.layout_checks import check_layout, check_parallel
from megatron_prime.config.schema import ParallelSection


def problems(shared_ffn_hidden_size: int | None = None, **sizes: Any) -> list[str]:
    parallel = ParallelSection(**sizes)
    experts = SimpleNamespace(num_experts=12, shared_ffn_hidden_size=shared_ffn_hidden_size)
    # Channels that nothing can be cut into, where all feed-forward parts are experts.
    shape: Any = SimpleNamespace(**vars(SHAPE) | {"experts": experts, "ffn_hidden_size": 15})
    return check_parallel(parallel) + check_layout(parallel, shape)


@pytest.mark.parametrize(
    "sizes",
    [
        {"world_size": 2, "expert_model_parallel_size": 2},
        {"world_size": 4, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "sequence_parallel": True},
        {"world_size": 4, "tensor_model_parallel_size": 4, "expert_model_parallel_size": 2, "sequence_parallel": True},
        {"world_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "shared_ffn_hidden_size": 8},
    ],
)
def test_sound(sizes: dict[str, Any]) -> None:
    assert problems(**sizes) == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"expert_model_parallel_size": 2}, "parallel.expert_model_parallel_size: 2 does not divide the 1 ranks"),
        (
            {"world_size": 5, "expert_model_parallel_size": 5},
            "parallel.expert_model_parallel_size: 5 does not divide the model's 12 experts",
        ),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2},
            "parallel.sequence_parallel: tensor-parallel ranks would all send the same tokens",
        ),
        (
            {
                "world_size": 12,
                "tensor_model_parallel_size": 4,
                "expert_model_parallel_size": 6,
                "sequence_parallel": True,
            },
            "parallel.expert_model_parallel_size: 6 and parallel.tensor_model_parallel_size = 4 do not divide",
        ),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "shared_ffn_hidden_size": 15},
            "parallel.tensor_model_parallel_size: the model's 15 feed-forward channels",
        ),
    ],
)
def test_one_problem(sizes: dict[str, Any], expected: str) -> None:
    (problem,) = problems(**sizes)
    assert problem.startswith(expected)
