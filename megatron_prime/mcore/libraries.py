"""Which optional libraries the models use: Transformer Engine for layers and FP8, it or apex for Adam.

Import this module only inside `cpu.megatron_platform`: it imports Megatron.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from megatron.core import optimizer as megatron_optimizer

from megatron_prime.config.schema_model import ModelSection
from megatron_prime.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Libraries:
    """What was chosen, for the whole process."""

    transformer_engine: bool
    """Layers and attention; otherwise Megatron's local ones with our norm and attention."""
    adam: str
    """Package of the optimizer: Megatron takes Transformer Engine's, else apex's, else torch's."""

    def __str__(self) -> str:
        return f"layers of {'Transformer Engine' if self.transformer_engine else 'torch'}, Adam of {self.adam}"


def choose_libraries(model: ModelSection) -> Libraries:
    """Looks at what this machine has.

    Raises:
        ConfigError: Transformer Engine, or FP8, is demanded but cannot be had.
    """
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl: 'transformer_engine' needs CUDA and the transformer_engine package; "
            "install megatron-prime[gpu] or use 'auto'"
        )
    transformer_engine = available and model.transformer_impl != "local"
    if model.fp8 is not None and not transformer_engine:
        raise ConfigError(
            f"model.fp8: {model.fp8!r} needs CUDA and the transformer_engine package; install megatron-prime[gpu] or "
            "set it to null"
        )
    return Libraries(transformer_engine=transformer_engine, adam=megatron_optimizer.Adam.__module__.partition(".")[0])
