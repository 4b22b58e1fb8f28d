"""vLLM's weight-transfer back-ends for shared memory and the network, and the worker's own part of a checked update.

Imported in every vLLM worker (it is the worker extension's module), which registers the back-ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import vllm._custom_ops as custom_ops
import vllm.model_executor.layers.utils as layer_utils
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_prime.rollout.vllm.wire.broadcast import Group, TransferAborted
from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver, Channel
from megatron_prime.rollout.vllm.wire.ipc import BucketReader
from megatron_prime.rollout.vllm.wire.messages import BACKENDS, PLAIN, BucketUpdate, SharedUpdate
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, TensorEntry, whole_tensors
from megatron_prime.rollout.vllm.worker.check_weights import EngineCheck, is_packed
from megatron_prime.rollout.vllm.worker.placement import Placement

_BATCH_BYTES = 64 << 20
_CPU = torch.device("cpu")
Batches = Iterator[list[tuple[str, torch.Tensor]]]
"""Tensors with their names, some at a time."""


class CheckedTransfer(WeightTransferEngine[Any, Any]):
    """Loads whole Hugging Face tensors, of which each worker reads only its share, and compares what it then holds.

    An update that raises, or that nobody finishes, leaves old and new weights side by side. Nothing here undoes that:
    the process ends, or is never asked for an answer again before it has loaded a whole set.
    """

    supports_draft_weight_update = False
    num_probed_columns = 0
    _is_reloading = False

    def start_weight_update(self) -> None:
        """Prepares the layers whose weights vLLM has transformed after loading."""
        self.leave_update()
        # Asked before the reload: it puts unpacked parameters into the layers.
        self._is_packed = any(is_packed(layer) for layer in self.model.modules())
        if self._is_packed:
            if os.environ.get(PLAIN) == "1":
                raise RuntimeError("rollout.vllm.pack_weights: on this CPU vLLM repacks matrices in any case; use true")
            initialize_layerwise_reload(self.model)
            self._is_reloading = True

    def leave_update(self) -> None:
        """Gives layers that wait for the rest of an update their own tensors back, and forgets what they had got."""
        if not self._is_reloading:
            return
        for layer in self.model.modules():
            if (info := get_layerwise_info(layer)).can_load():
                info.load_numel = info.load_numel_total = 0
                info.loaded_weights.clear()
        self._finish_reload()

    def _finish_reload(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._is_reloading = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one complete set (without the base class's wait for an accelerator)."""
        self.receive_weights(self.parse_update_info(update_info))

    def digests(self) -> torch.Tensor:
        """The trainer's checksums of the last set [slices, bytes]."""
        raise NotImplementedError

    def load(
        self,
        batches: Batches,
        plan: SharedPlan,
        *,
        compare_digests: bool,
        device: torch.device,
        placement: Placement | None = None,
    ) -> None:
        """Loads tensors as they come, close behind the trainer that sends them.

        Args:
            batches: all tensors of the plan. Where matrices are repacked they stay valid, otherwise those of a batch
                only until the next.
            plan: what is sent.
            compare_digests: compare the trainer's checksums too.
            device: where checksums are computed.
            placement: loads tensors, in place of vLLM.
        """
        self._sent: dict[str, torch.Tensor] = {}
        self._new_check = partial(EngineCheck, self.model, plan, compare_digests=compare_digests, device=device)
        # A layer that is repacked has other parameters until then.
        self._check = None if self._is_packed else self._new_check()
        with torch.no_grad():
            if self._check is None:
                tensors = self._kept(batches)
                self.model.load_weights(tensors)  # type: ignore[operator]
                # A model that asks for nothing (or for less) leaves the stream before its end.
                for _ in tensors:
                    pass
                return
            for batch in batches:
                if placement is None:
                    self.model.load_weights(iter(batch))  # type: ignore[operator]
                for name, tensor in batch:
                    if placement is not None:
                        placement.load(name, tensor)
                    self._check.loaded(name, tensor)

    def _kept(self, batches: Batches) -> Iterator[tuple[str, torch.Tensor]]:
        for batch in batches:
            for name, tensor in batch:
                self._sent[name] = tensor
                yield name, tensor

    def finish_weight_update(self) -> None:
        """Transforms what vLLM transforms, and compares what the engine now holds with what the trainer has."""
        if self._is_packed:
            self._finish_reload()
            _repack_tied_head(self.model)
        check = self._check or self._new_check()
        for name, tensor in self._sent.items():
            check.loaded(name, tensor)
        check.finish(self._sent, self.digests)
        self._sent.clear()
        self.num_probed_columns = check.num_columns


@dataclass
class _EmptyInit(WeightTransferInitInfo):
    pass


@dataclass
class _SharedMemoryInfo(WeightTransferUpdateInfo):
    update: SharedUpdate


class SharedMemoryTransfer(CheckedTransfer):
    """Weights lie in memory that the trainer's ranks on this host write, many of them where they stay."""

    init_info_cls = _EmptyInit
    update_info_cls = _SharedMemoryInfo
    _weights: SharedWeights | None = None
    _placement: Placement | None = None
    _update: SharedUpdate

    def init_transfer_engine(self, init_info: _EmptyInit) -> None:
        """Nothing to agree on: every update names its memory."""

    def receive_weights(self, update_info: _SharedMemoryInfo) -> None:
        """Loads while the trainer writes."""
        self._update = update = update_info.update
        if self._weights is None or self._weights.path != update.path:
            # Kept from update to update: mapping a large set anew takes longer than copying it.
            self._weights = SharedWeights(update.plan, update.path, writable=False)
            is_plain = self.device.type == "cpu" and not self._is_packed
            self._placement = Placement(self.model, self._weights) if is_plain else None
        self.load(
            self._batches(self._weights),
            update.plan,
            compare_digests=update.compare_digests,
            device=_CPU,
            placement=self._placement,
        )

    def _batches(self, weights: SharedWeights) -> Batches:
        """Tensors as they are written; several at a time where vLLM begins anew with each batch."""
        batch: list[tuple[str, torch.Tensor]] = []
        batch_bytes = 0 if self._is_packed or self._placement is not None else _BATCH_BYTES
        for number, (name, tensor) in enumerate(weights.tensors.items()):
            weights.wait(number + 1, self._update.timeout_seconds)
            batch.append((name, tensor))
            if sum(tensor.nbytes for _, tensor in batch) >= batch_bytes:
                yield batch
                batch = []
        yield batch

    def digests(self) -> torch.Tensor:
        """See `CheckedTransfer.digests`; waits for the trainer's ranks."""
        assert self._weights is not None
        self._weights.wait(len(self._update.plan.entries) + 1, self._update.timeout_seconds)
        return self._weights.digests

    def shutdown(self) -> None:
        """Unmaps the memory."""
        self._weights = self._placement = None


class BucketTransfer(CheckedTransfer):
    """Weights come in buckets (`buckets.BucketSender`), which are loaded before the next ones come.

    Only where matrices are repacked whole sets are kept, in this process's memory, until they have been compared.
    """

    _receiver: BucketReceiver | None = None

    def receive(
        self, plan: SharedPlan, channel: Channel, bucket_bytes: int, device: torch.device, *, compare_digests: bool
    ) -> None:
        """Loads one set while buckets arrive on the device."""
        if self._receiver is None:
            self._receiver = BucketReceiver(plan, channel, bucket_bytes, device, keeps_all=self._is_packed)
        self.load(iter(self._receiver), plan, compare_digests=compare_digests, device=device)

    def digests(self) -> torch.Tensor:
        """See `CheckedTransfer.digests`; they came behind the tensors."""
        assert self._receiver is not None
        return self._receiver.digests

    def shutdown(self) -> None:
        """Frees the memory."""
        self._receiver = None


@dataclass
class _BucketInfo(WeightTransferUpdateInfo):
    update: BucketUpdate


class IpcTransfer(BucketTransfer):
    """Buckets are memory of the trainer's on this host, on a GPU or not."""

    init_info_cls = _EmptyInit
    update_info_cls = _BucketInfo
    _reader: BucketReader | None = None

    def init_transfer_engine(self, init_info: _EmptyInit) -> None:
        """Nothing to agree on: every update names its buckets."""

    def receive_weights(self, update_info: _BucketInfo) -> None:
        """Loads while the trainer sends."""
        update = update_info.update
        if self._reader is None or self._reader.offer != update.offer:
            self.shutdown()
            self._reader = BucketReader(update.offer, self.parallel_config.rank, update.timeout_seconds)
        self._reader.start(update.first_bucket)
        device = _CPU if update.offer.cuda_handle is None else self.device
        bucket_bytes, compare_digests = update.offer.bucket_bytes, update.compare_digests
        self.receive(update.plan, self._reader, bucket_bytes, device, compare_digests=compare_digests)

    def shutdown(self) -> None:
        """See `BucketTransfer.shutdown`."""
        super().shutdown()
        if self._reader is not None:
            self._reader.close()
        self._reader = None


@dataclass
class _Meeting(WeightTransferInitInfo):
    """Where the trainer and the workers of all engines meet, and what will be sent."""

    backend: Literal["gloo", "nccl"]
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
class _EmptyInfo(WeightTransferUpdateInfo):
    pass


class BroadcastTransfer(BucketTransfer):
    """Buckets come over the network."""

    init_info_cls = _Meeting
    update_info_cls = _EmptyInfo
    _group: Group | None = None

    def init_transfer_engine(self, init_info: _Meeting) -> None:
        """Meets the others."""
        self.shutdown()
        if init_info.backend == "nccl" and self.device.type != "cuda":
            raise ValueError("rollout.vllm.transfer: nccl needs servers with GPUs; use gloo")
        self._meeting = init_info
        self._bucket_device = self.device if init_info.backend == "nccl" else _CPU
        entries = tuple(TensorEntry(name, tuple(shape), *rest) for name, shape, *rest in init_info.entries)
        self._plan = whole_tensors(entries)
        rank = init_info.first_rank + self.parallel_config.rank
        address, timeout = (init_info.address, init_info.port), init_info.timeout_seconds
        self._group = Group(init_info.backend, *address, rank, init_info.size, timeout, self._bucket_device)

    def receive_weights(self, update_info: _EmptyInfo) -> None:
        """Loads while buckets arrive."""
        assert self._group is not None
        bucket_bytes, compare_digests = self._meeting.bucket_bytes, self._meeting.compare_digests
        try:
            self.receive(self._plan, self._group, bucket_bytes, self._bucket_device, compare_digests=compare_digests)
        except TransferAborted:
            raise
        except Exception:
            # vLLM collects its workers' results in order: without this the others would wait for their time-outs.
            with contextlib.suppress(RuntimeError):
                self._group.abort()
            raise

    def shutdown(self) -> None:
        """See `BucketTransfer.shutdown`."""
        super().shutdown()
        self._group = None


class WorkerExtension:
    """Methods that vLLM's workers get in addition; names start with ``prime_`` to clash with none of theirs."""

    weight_transfer_engine: CheckedTransfer
    model_runner: Any
    _weight_update_active: bool

    def prime_leave_update(self) -> None:
        """Ends an update that was abandoned: vLLM itself ends only those that raise."""
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()

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


def leave_matrices_plain() -> None:
    """Keeps vLLM from repacking matrices, in this process and in the workers that it starts."""
    os.environ[PLAIN] = "1"
    custom_ops._supports_onednn = False
    # Its kernel for small matrices, on CPUs with AMX.
    layer_utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


def _repack_tied_head(model: Any) -> None:
    """A tied head keeps a packed copy of its own, which vLLM 0.32 does not renew with the embedding."""
    head, embedding = getattr(model, "lm_head", None), getattr(model.model, "embed_tokens", None)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and head is not None and embedding is not None and head is not embedding and hasattr(head, "cpu_linear"):
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


if os.environ.get(PLAIN) == "1":
    leave_matrices_plain()
for _name, _transfer in zip(BACKENDS.values(), (SharedMemoryTransfer, IpcTransfer, BroadcastTransfer), strict=True):
    WeightTransferEngineFactory.register_engine(_name, _transfer)
