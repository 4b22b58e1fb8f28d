"""What a layout can get wrong, by itself and for a model of a given shape."""

from __future__ import annotations

from typing import Protocol

from megatron_prime.config.engine_checks import EngineArchitecture
from megatron_prime.config.schema import ParallelSection


class ExpertLayers(Protocol):
    """The same for layers with experts."""

    @property
    def num_experts(self) -> int: ...
    @property
    def shared_ffn_hidden_size(self) -> int | None: ...


class Architecture(EngineArchitecture, Protocol):
    """The numbers of a model's shape that a layout must agree with."""

    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def experts(self) -> ExpertLayers | None: ...


def data_parallel_size(parallel: ParallelSection) -> int:
    """Replicas of the model: world_size / (tensor * pipeline * context), rounded down."""
    return parallel.world_size // _ranks_of_a_replica(parallel)


def _ranks_of_a_replica(parallel: ParallelSection) -> int:
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def check_parallel(parallel: ParallelSection) -> list[str]:
    """Finds sizes that do not fit together; one line ``key: problem; fix`` per problem."""
    problems = []
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    size = _ranks_of_a_replica(parallel)
    if parallel.world_size % size:
        problems.append(
            f"parallel.world_size: {parallel.world_size} is not divisible by tensor x pipeline x context = {tensor} x "
            f"{pipeline} x {parallel.context_parallel_size}; use a multiple of {size}"
        )
    problems += _check_expert_parallel(parallel)
    if parallel.virtual_pipeline_model_parallel_size is not None and pipeline == 1:
        problems.append(
            "parallel.virtual_pipeline_model_parallel_size: interleaves pipeline stages and there is one"
            "; set parallel.pipeline_model_parallel_size above 1 or this to null"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        problems.append(
            "parallel.overlap_param_gather: needs parallel.use_distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true; set both"
        )
    if parallel.sequence_parallel and tensor == 1:
        problems.append(
            "parallel.sequence_parallel: shards over tensor-parallel ranks and there is one"
            "; set parallel.tensor_model_parallel_size above 1 or parallel.sequence_parallel=false"
        )
    return problems


def _check_expert_parallel(parallel: ParallelSection) -> list[str]:
    size, tensor = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    key = f"parallel.expert_model_parallel_size: {size}"
    num_ranks = parallel.world_size // parallel.pipeline_model_parallel_size
    if num_ranks % size:
        return [f"{key} does not divide the {num_ranks} ranks of a pipeline stage; use a divisor"]
    if size % tensor and tensor % size:
        return [f"{key} and parallel.tensor_model_parallel_size = {tensor} do not divide each other; change one"]
    return []


def check_layout(parallel: ParallelSection, architecture: Architecture) -> list[str]:
    """Finds what a model cannot be cut into; one line ``key: problem; fix`` per problem."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sharded = {
        "attention heads": architecture.num_attention_heads,
        "query groups (key-value heads)": architecture.num_query_groups,
        "feed-forward channels": architecture.ffn_hidden_size,
    }
    if architecture.experts is not None:
        sharded["feed-forward channels"] = architecture.experts.shared_ffn_hidden_size or 0
    problems = [
        f"parallel.tensor_model_parallel_size: the model's {number} {what} are not divisible by {tensor}; use a divisor"
        for what, number in sharded.items()
        if number % tensor
    ]
    problems += _check_experts(parallel, architecture.experts)
    virtual = parallel.virtual_pipeline_model_parallel_size
    if architecture.num_layers % pipeline:
        problems.append(
            f"parallel.pipeline_model_parallel_size: the model's {architecture.num_layers} layers are not divisible"
            f" by {pipeline}; use a divisor"
        )
    elif virtual is not None and architecture.num_layers % (pipeline * virtual):
        problems.append(
            f"parallel.virtual_pipeline_model_parallel_size: the {architecture.num_layers // pipeline} layers of a "
            f"pipeline stage are not divisible by {virtual}; use a divisor"
        )
    return problems


def _check_experts(parallel: ParallelSection, experts: ExpertLayers | None) -> list[str]:
    size = parallel.expert_model_parallel_size
    if experts is None:
        return [] if size == 1 else ["parallel.expert_model_parallel_size: the model has no experts; use 1"]
    problems = []
    if experts.num_experts % size:
        problems.append(
            f"parallel.expert_model_parallel_size: {size} does not divide the model's {experts.num_experts} experts"
            "; use a divisor"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        problems.append(
            "parallel.sequence_parallel: tensor-parallel ranks would all send the same tokens to the experts; set it to"
            " true or parallel.tensor_model_parallel_size=1"
        )
    return problems
