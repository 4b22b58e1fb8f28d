"""vLLM's weight-transfer back-ends for shared memory and the network, and the worker's own part of a checked update.

Imported in every vLLM worker (it is the worker extension's module), which registers the back-ends.
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

from megatron_prime.rollout.vllm.broadcast import BucketReceiver, Group
from megatron_prime.rollout.vllm.messages import SharedUpdate
from megatron_prime.rollout.vllm.shared_weights import SharedWeights, TensorEntry, whole_tensors
from megatron_prime.rollout.vllm.verify import check_engine

SHARED_MEMORY, BROADCAST = "megatron_prime_shared_memory", "megatron_prime_broadcast"


class CheckedTransfer(WeightTransferEngine[Any, Any]):
    """Loads whole Hugging Face tensors, of which each worker reads only its share, and compares what it then holds.

    An update that raises leaves the model half loaded. Nothing here undoes that: the process ends, or is never asked
    for an answer again, and a new one loads the whole set.
    """

    supports_draft_weight_update = False
    _weights: SharedWeights | None = None
    _update: SharedUpdate

    def start_weight_update(self) -> None:
        """Prepares the layers whose weights vLLM has transformed after loading."""
        # Asked before the reload: it puts unpacked parameters into the layers.
        self._is_packed = any(is_packed(layer) for layer in self.model.modules())
        if self._is_packed:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one complete set (without the base class's wait for an accelerator)."""
        self.receive_weights(self.parse_update_info(update_info))

    def wait(self, num_tensors: int) -> None:
        """Returns when the first `num_tensors` tensors have arrived."""
        raise NotImplementedError

    def load(self) -> None:
        """Loads tensor after tensor, close behind the trainer that sends them."""
        assert self._weights is not None
        tensors = self._weights.tensors

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, tensor) in enumerate(tensors.items()):
                self.wait(number + 1)
                yield name, tensor

        with torch.no_grad():
            self.model.load_weights(stream())  # type: ignore[operator]
        # A model that asks for nothing (or for less) leaves the stream before its end.
        self.wait(len(tensors))

    def finish_weight_update(self) -> None:
        """Transforms what vLLM transforms, and compares what the engine now holds with what the trainer has."""
        if self._is_packed:
            finalize_layerwise_reload(self.model, self.model_config)
            _repack_tied_head(self.model)
        assert self._weights is not None
        self.num_probed_columns = check_engine(self.model, self._weights, self._update)


@dataclass
class _NothingToSay(WeightTransferInitInfo):
    pass


@dataclass
class _WhatIsInMemory(WeightTransferUpdateInfo):
    update: SharedUpdate


class SharedMemoryTransfer(CheckedTransfer):
    """Weights lie in memory that the trainer's ranks on this host write."""

    init_info_cls = _NothingToSay
    update_info_cls = _WhatIsInMemory

    def init_transfer_engine(self, init_info: _NothingToSay) -> None:
        """Nothing to agree on: every update names its memory."""

    def receive_weights(self, update_info: _WhatIsInMemory) -> None:
        """Loads while the trainer writes."""
        self._update = update = update_info.update
        if self._weights is None or self._weights.path != update.path:
            # Kept from update to update: mapping a large set anew takes longer than copying it.
            self._weights = SharedWeights(update.plan, update.path, writable=False)
        self.load()

    def wait(self, num_tensors: int) -> None:
        """See `CheckedTransfer.wait`."""
        assert self._weights is not None
        self._weights.wait(num_tensors, self._update.timeout_seconds)

    def shutdown(self) -> None:
        """Unmaps the memory."""
        self._weights = None


@dataclass
class _Meeting(WeightTransferInitInfo):
    """Where the trainer and the workers of all engines meet, and what will be sent."""

    address: str
    port: int
    first_rank: int
    """Of this engine's workers."""
    size: int
    entries: list[list[Any]]
    """`TensorEntry` by `TensorEntry`."""
    bucket_bytes: int
    compare_digests: bool
    timeout_seconds: float


@dataclass
class _TheSame(WeightTransferUpdateInfo):
    pass


class BroadcastTransfer(CheckedTransfer):
    """Weights come over the network (`broadcast.BucketSender`) and stay in this process's memory until the next."""

    init_info_cls = _Meeting
    update_info_cls = _TheSame
    _receiver: BucketReceiver | None = None

    def init_transfer_engine(self, init_info: _Meeting) -> None:
        """Meets the others."""
        self.shutdown()
        entries = tuple(TensorEntry(name, tuple(shape), *rest) for name, shape, *rest in init_info.entries)
        plan = whole_tensors(entries)
        self._weights = SharedWeights(plan)
        self._update = SharedUpdate(
            path=self._weights.path,
            plan=plan,
            compare_digests=init_info.compare_digests,
            timeout_seconds=init_info.timeout_seconds,
        )
        rank = init_info.first_rank + self.parallel_config.rank
        group = Group(init_info.address, init_info.port, rank, init_info.size, init_info.timeout_seconds)
        self._receiver = BucketReceiver(self._weights, group, init_info.bucket_bytes)

    def receive_weights(self, update_info: _TheSame) -> None:
        """Loads while buckets arrive."""
        assert self._receiver is not None
        self._receiver.begin()
        self.load()
        self._receiver.finish()

    def wait(self, num_tensors: int) -> None:
        """See `CheckedTransfer.wait`."""
        assert self._receiver is not None
        self._receiver.wait(num_tensors)

    def shutdown(self) -> None:
        """Leaves the group and frees the memory."""
        self._receiver = None
        if self._weights is not None:
            self._weights.close()
        self._weights = None


class WorkerExtension:
    """Methods that vLLM's workers get in addition; names start with ``prime_`` to clash with none of theirs."""

    weight_transfer_engine: CheckedTransfer
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


for _name, _transfer in ((SHARED_MEMORY, SharedMemoryTransfer), (BROADCAST, BroadcastTransfer)):
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _transfer)
