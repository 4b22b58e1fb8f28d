"""The sections about the models: what they start from, how they are cut over processes and batches."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_prime.config.section import MAY_CHANGE, Count, Positive, Section


@dataclass(kw_only=True, slots=True)
class ModelSection(Section):
    """The model that policy, reference and PRM start from."""

    path: str
    """Hugging Face folder: config.json, tokenizer and (unless `init: random`) safetensors weights."""
    init: Literal["weights", "random"] = "weights"
    """`random` takes only the shape and the tokenizer from `path`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations; optimizer states are float32 always."""
    make_vocab_size_divisible_by: Annotated[Count, MAY_CHANGE] = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; `auto` takes Transformer Engine for `bfloat16` on CUDA where it is installed (for packed
    sequences on GPUs before Hopper flash-attn too), else Megatron's local layers with torch's attention."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of the layers in FP8 (`hybrid`: gradients in e5m2); needs Transformer Engine and `bfloat16`."""
    recompute_granularity: Annotated[Literal["none", "selective", "full"], MAY_CHANGE] = "none"
    """Activation recomputation of the trained models."""


@dataclass(kw_only=True, slots=True)
class ParallelSection(Section):
    """The layout that policy, reference and PRM share."""

    world_size: Count = 1
    """Processes of the run; data parallel size = world_size / (tensor * pipeline * context)."""
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None = None
    """Parts of the model on each pipeline stage, which take turns (interleaved schedule); smaller pipeline bubbles."""
    context_parallel_size: Count = 1
    """Ranks among which every sequence is cut; for long answers."""
    expert_model_parallel_size: Count = 1
    """Ranks that share out the experts of a layer, which are whole on one of them; they are ranks of the same pipeline
    stage: first the tensor-parallel ones, then those of context and data."""
    sequence_parallel: bool = False
    """Shard the activations of norms over the tensor-parallel ranks. Models with experts train with it only."""
    use_distributed_optimizer: bool = False
    """Shard optimizer states over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel ranks while the backward pass of the last micro-batch still runs."""
    overlap_param_gather: bool = False
    """Gather stepped parameters while the forward pass of the next mini-batch runs; needs both switches above."""
    offload_idle: Literal["none", "gradients", "all"] = "none"
    """What a model gives away while it does not compute: buffers of gradients and FP8 copies of weights; `all`: on a
    GPU, also weights and optimizer states, which then wait in host memory. Never changes a result."""
    timeout_seconds: Positive = 1800.0
    """How long a rank waits for the others, or for data, before the run ends and says which rank did not arrive."""


@dataclass(kw_only=True, slots=True)
class MicroBatchSection(Section):
    """How a batch is cut for the forward pass. Never changes a result, only memory and speed."""

    packed: bool = True
    """Sequences back to back without padding (thd); false: right-padded rows."""
    micro_batch_size: Count | None = None
    """Sequences of a micro-batch; exactly one of this and `micro_batch_tokens` is set."""
    micro_batch_tokens: Count | None = None
    """Tokens of a micro-batch at the most (a longer sequence goes alone)."""


@dataclass(kw_only=True, slots=True)
class HeadSection(Section):
    """The log-prob op of all models. Never changes a result by more than rounding, only memory and speed."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """`auto`: Triton on GPUs of compute capability 8.0 and up where it is installed, else torch."""
    gemm: Literal["auto", "mm", "onednn"] = "auto"
    """Float32 matrix product of the torch backend on CPUs; `auto` measures when a run begins and keeps to it."""
    workspace_mib: Positive = 256.0
    """Logits, or their exponentials, that exist at one time on one rank."""
