"""vLLM's weight-transfer back-end for shared memory, and the worker's own part of a checked update.

Imported in every vLLM worker (it is the worker extension's module), which registers the back-end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_prime.rollout.vllm.messages import SharedUpdate
from megatron_prime.rollout.vllm.shared_weights import SharedWeights
from megatron_prime.rollout.vllm.verify import check_engine

SHARED_MEMORY = "megatron_prime_shared_memory"


@dataclass
class _InitInfo(WeightTransferInitInfo):
    pass


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    update: SharedUpdate


class SharedMemoryTransfer(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Loads whole Hugging Face tensors that lie in shared memory; each worker reads only its share of them.

    An update that raises leaves the model half loaded. Nothing here undoes that: the process ends and a new one
    loads the whole set.
    """

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Nothing to agree on: every update names its memory."""
        self._weights: SharedWeights | None = None

    def start_weight_update(self) -> None:
        """Prepares the layers whose weights vLLM has transformed after loading."""
        # Asked before the reload: it puts unpacked parameters into the layers.
        self._is_packed = any(is_packed(layer) for layer in self.model.modules())
        if self._is_packed:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one complete set (without the base class's wait for an accelerator)."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        """Loads tensor after tensor, close behind the trainer that writes them."""
        self._update = update = update_info.update
        if self._weights is None or self._weights.path != update.path:
            # Kept from update to update: mapping a large set anew takes longer than copying it.
            self._weights = SharedWeights(update.plan, update.path, writable=False)
        weights, model = self._weights, self.model

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, tensor) in enumerate(weights.tensors.items()):
                weights.wait(number + 1, update.timeout_seconds)
                yield name, tensor

        with torch.no_grad():
            model.load_weights(stream())  # type: ignore[operator]
        # A model that asks for nothing (or for less) leaves the stream before its end.
        weights.wait(len(update.plan.entries), update.timeout_seconds)

    def finish_weight_update(self) -> None:
        """Transforms what vLLM transforms, and compares what the engine now holds with what the trainer has."""
        if self._is_packed:
            finalize_layerwise_reload(self.model, self.model_config)
            _repack_tied_head(self.model)
        assert self._weights is not None
        self.num_probed_columns = check_engine(self.model, self._weights, self._update)

    def shutdown(self) -> None:
        """Unmaps the memory."""
        self._weights = None


class WorkerExtension:
    """Methods that vLLM's workers get in addition; names start with ``prime_`` to clash with none of theirs."""

    weight_transfer_engine: SharedMemoryTransfer
    model_runner: Any

    def prime_num_probed_columns(self) -> int:
        """Of the last update (`messages.Loaded`)."""
        return self.weight_transfer_engine.num_probed_columns

    def prime_zero_kv_cache(self) -> None:
        """Forgets keys and values: on a CPU, NaN in unused blocks reaches the attention of later requests."""
        for cache in self.model_runner.kv_caches:
            cache.zero_()

    def prime_process_id(self) -> int:
        """Of this worker."""
        return os.getpid()


def is_packed(layer: torch.nn.Module) -> bool:
    """Whether oneDNN holds this layer's matrix and the parameter itself is empty."""
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.numel() == 0


def _repack_tied_head(model: Any) -> None:
    """A tied head keeps a packed copy of its own, which vLLM 0.32 does not renew with the embedding."""
    head, embedding = getattr(model, "lm_head", None), getattr(model.model, "embed_tokens", None)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and head is not None and embedding is not None and head is not embedding and hasattr(head, "cpu_linear"):
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


if SHARED_MEMORY not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryTransfer)
