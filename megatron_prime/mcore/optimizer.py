"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule.

Import this module only inside `cpu.megatron_platform`: it imports Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prime.config.schema import ModelSection, OptimizerSection, ParallelSection
from megatron_prime.mcore.dtypes import DTYPES


def wrap_data_parallel(modules: Sequence[Any], parallel: ParallelSection) -> list[DistributedDataParallel]:
    """Megatron's gradient buffers (float32) and their reduction over data-parallel ranks, for each part of a model."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    model_config = modules[0].config
    # Only the first chunk's backward pass ends the step; the others have finished early enough without bucketing.
    wrapped = [
        DistributedDataParallel(model_config, config, module, disable_bucketing=number > 0)
        for number, module in enumerate(modules)
    ]

    def finalize(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        # Losses are normalised over the mini-batch already: no division by the token count here.
        finalize_model_grads(model, None, **kwargs)

    model_config.finalize_model_grads_func = finalize
    if parallel.overlap_grad_reduce:
        functions = [ddp.no_sync for ddp in wrapped]
        # Reduction starts when the last micro-batch has been through a bucket.
        model_config.no_sync_func = functions if len(functions) > 1 else functions[0]
    return wrapped


def build_optimizer(
    wrapped: list[DistributedDataParallel],
    section: OptimizerSection,
    model: ModelSection,
    parallel: ParallelSection,
) -> Any:
    """Megatron's Adam over the wrapped parts of one model."""
    dtype = DTYPES[model.dtype]
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, list(wrapped))
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    _use_fused_adam(optimizer)
    return optimizer


def _parts(optimizer: Any) -> list[Any]:
    """Returns the Megatron optimizers that make up a model's; experts have one of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _use_fused_adam(optimizer: Any) -> None:
    """Switches torch's Adam, which Megatron takes where it finds no better one, to its fused kernels.

    The default is a Python loop over the parameters on a CPU; on CUDA it is kernels over lists of tensors, which need
    room for a copy of all parameters.
    """
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def build_scheduler(optimizer: Any, section: OptimizerSection, num_steps: int) -> OptimizerParamScheduler:
    """Learning rate of each optimizer step; ``num_steps`` is where a decaying schedule ends."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_steps,
        lr_decay_steps=max(num_steps, section.lr_warmup_steps + 1),
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        # The run folder says which keys a resumed run may change; a longer run stretches the schedule.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def gradient_norm(optimizer: Any) -> float:
    """Norm of the accumulated gradients over all ranks, before anything is clipped or changed; collective."""
    # `prepare_grads` returns true only if a loss scaler found NaN or Inf.
    return math.inf if optimizer.prepare_grads() else float(optimizer.get_grad_norm())


def step_with_norm(optimizer: Any, norm: float) -> None:
    """Clips and steps after `gradient_norm`, as Megatron's own step does, without computing the norm again."""
    for inner in _parts(optimizer):
        parameters = inner.get_parameters()
        if parameters and inner.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=inner.config.clip_grad, total_norm=norm)
    succeeded = optimizer.step_with_ready_grads()
    assert succeeded


def stepped_parameters_are_finite(optimizer: Any) -> bool:
    """Returns whether the parameters (or shards of them) that this rank steps are free of NaN and Inf."""
    parameters = [parameter.data for inner in _parts(optimizer) for parameter in inner.get_parameters()]
    if not parameters:
        return True
    # One fused call for all tensors: the infinity norm of a tensor with a NaN or Inf is NaN or Inf.
    largest = torch._foreach_norm(parameters, torch.inf)  # pyright: ignore[reportPrivateImportUsage]
    return all(bool(norm.isfinite()) for norm in largest)
