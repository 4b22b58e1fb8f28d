"""What a conversion writes and the memory it takes, from the model's shape alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from megatron_prime.checkpoint.torch_dist import file_name
from megatron_prime.config.schema import ModelSection
from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.families import WeightSpec, weight_specs
from megatron_prime.weights.hf_folder import expected_shapes
from megatron_prime.weights.hf_writer import MAX_SHARD_BYTES, plan_shards
from megatron_prime.weights.sharding import local_shape

RELEASE_BYTES = 64 << 20
"""How much is read before the source's pages are given back."""
_SLACK_BYTES = 2 * RELEASE_BYTES
"""What is read between, and what the libraries load at first use."""
_COPIES = 3
"""Of the largest tensor: the source's pages or chunk, the tensor put together, and it cast or cut to pieces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The layout that a checkpoint's files are cut for; it loads at any other, reading larger pieces."""

    tp_size: int = 1
    pp_size: int = 1


WHOLE = Cut()


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """What a conversion would do."""

    num_tensors: int
    num_bytes: int
    """Of the weights written, padding included."""
    largest: str
    largest_bytes: int
    peak_bytes: int
    """Memory beyond the libraries' own, at most."""
    files: dict[str, int]
    """Bytes of weights by file."""


def plan_conversion(
    architecture: ModelArchitecture, *, megatron: bool, stored: torch.dtype, dtype: torch.dtype, cut: Cut = WHOLE
) -> ConversionPlan:
    """What a conversion would write, and the memory that it would take.

    Args:
        architecture: the model.
        megatron: the direction.
        stored: what the source's weights are stored as.
        dtype: what the target's will be.
        cut: of the Megatron checkpoint.

    Raises:
        WeightsError: the model cannot be cut so.
    """
    if megatron:
        files = megatron_files(architecture, pipeline_stages(architecture, cut), cut, dtype)
    else:
        sizes = hf_sizes(architecture, dtype)
        shards = plan_shards(expected_shapes(architecture), dtype.itemsize, MAX_SHARD_BYTES)
        files = {file: sum(sizes[name] for name in names) for file, names in shards.items()}
    specs = weight_specs(architecture)
    numbers = {spec.megatron_name: sum(math.prod(shape) for shape in spec.hf_shapes) for spec in specs}
    largest = max(numbers, key=lambda name: numbers[name])
    return ConversionPlan(
        num_tensors=len(specs) if megatron else len(expected_shapes(architecture)),
        num_bytes=sum(files.values()),
        largest=largest,
        largest_bytes=numbers[largest] * dtype.itemsize,
        peak_bytes=_COPIES * numbers[largest] * max(stored.itemsize, dtype.itemsize) + _SLACK_BYTES,
        files=files,
    )


def hf_sizes(architecture: ModelArchitecture, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every Hugging Face tensor."""
    return {name: math.prod(shape) * dtype.itemsize for name, shape in expected_shapes(architecture).items()}


def pipeline_stages(architecture: ModelArchitecture, cut: Cut) -> list[list[WeightSpec]]:
    """The weights of each pipeline stage."""
    if architecture.num_layers % cut.pp_size:
        raise WeightsError(
            f"parallel.pipeline_model_parallel_size: {cut.pp_size} does not divide num_hidden_layers"
            f" {architecture.num_layers}; choose a divisor of it"
        )
    per_stage = architecture.num_layers // cut.pp_size
    stages: list[list[WeightSpec]] = [[] for _ in range(cut.pp_size)]
    for spec in weight_specs(architecture):
        outside = 0 if spec.stage == "embedding" else -1
        stages[outside if spec.layer is None else spec.layer // per_stage].append(spec)
    return stages


def padded_vocab_size(architecture: ModelArchitecture, cut: Cut) -> int:
    """Rows of the embedding at a layout, with what pads it."""
    return architecture.padded_vocab_size(ModelSection(path="").make_vocab_size_divisible_by, cut.tp_size)


def megatron_files(
    architecture: ModelArchitecture, stages: list[list[WeightSpec]], cut: Cut, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of weights by file."""
    padded = padded_vocab_size(architecture, cut)
    files: dict[str, int] = {}
    for rank, (stage, tp_rank) in enumerate(itertools.product(stages, range(cut.tp_size))):
        shapes = [
            local_shape(spec, architecture, tp_size=cut.tp_size, padded_vocab_size=padded)
            for spec in stage
            if tp_rank == 0 or not spec.is_whole
        ]
        files[file_name(rank)] = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    return files
