"""The vLLM engine beside the trainer with weights that pass through two buckets, from GPU to GPU or in host memory."""

from __future__ import annotations

import contextlib
import logging
from collections import deque

import torch

from megatron_prime import collectives
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import ExportedWeights
from megatron_prime.rollout.vllm.trainer.base import Take, Waiting
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.process import EngineLost
from megatron_prime.rollout.vllm.wire.buckets import BucketSender
from megatron_prime.rollout.vllm.wire.ipc import SharedBuckets
from megatron_prime.rollout.vllm.wire.messages import BucketUpdate
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, lay_out, whole_tensors
from megatron_prime.weights.digests import find_non_finite

logger = logging.getLogger(__name__)


class VllmBesideBuckets(VllmBeside):
    """A `VllmBeside` of whose weights there is no second copy: the leader sends gathered tensors bucket by bucket.

    A new engine in place of a lost one therefore needs the copy's ranks: they send the current weights again.
    """

    _plan: SharedPlan | None = None
    _weights: ExportedWeights | None = None
    _channel: SharedBuckets | None = None
    _sent = ""
    """Checksum of the last set."""

    def prepare(self, weights: ExportedWeights) -> None:
        """See `VllmBeside.prepare`."""
        self._weights = weights
        if self._plan is None:
            self._plan = whole_tensors(lay_out(weights.tensors()))
            if self._is_leader:
                on_gpu = torch.cuda.is_available()
                device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
                readers, timeout = self._section.tensor_parallel_size, self._section.timeout_seconds
                self._channel = SharedBuckets(self._bucket_bytes, readers, device, timeout, self._is_lost)

    def _begin(self, weights: ExportedWeights) -> list[str]:
        self._start_early()
        return find_non_finite(weights.slices())

    def _checksum(self) -> str:
        return self._sent

    def _refit(self, weights: ExportedWeights) -> str | None:
        error: Exception | None = None
        for _ in range(self._section.max_restarts + 1):
            error = None
            if self._is_leader:
                try:
                    self._send(weights)
                except (EngineLost, RolloutError) as found:
                    self._lose(error := found)
            else:
                deque(weights, maxlen=0)
            (error,) = [found for found in weights.gather(error) if found is not None] or [None]
            if not isinstance(error, EngineLost):
                return str(error) if error else None
        return self._lost_too_often(error)

    def _start_early(self) -> None:
        """Starts an engine where there is none, while the other ranks wait for it without their GPUs."""
        if self._is_leader and self._process is None:
            # `_send` tries again, and says why it cannot.
            with contextlib.suppress(EngineLost, RolloutError):
                self._process = self._new_process()

    def _send(self, weights: ExportedWeights) -> None:
        """Has the engine, a new one if there is none, load what is sent; reads the weights to their end in any case."""
        assert self._plan is not None and self._channel is not None
        section, stream = self._section, iter(weights)
        try:
            if self._process is None:
                self._process = self._new_process()
            update = BucketUpdate(
                offer=self._channel.offer,
                first_bucket=self._channel.num_filled,
                plan=self._plan,
                compare_digests=section.verify_refit,
                timeout_seconds=section.timeout_seconds,
            )
            self._process.begin_load(update, self._version)
            try:
                buckets = self._channel.buckets
                sender = BucketSender(self._plan, self._channel, buckets, with_digests=section.verify_refit)
                self._sent = sender.send(stream)
            except RolloutError as error:
                # The engine says why, if it still can.
                logger.warning("sending weights to vLLM engine %d failed: %s", self._engine_index, error)
                deque(stream, maxlen=0)
            self._process.finish_load()
        finally:
            deque(stream, maxlen=0)

    def _is_lost(self) -> bool:
        return self._process is None or self._process.has_reply()

    def _sample(self, waiting: Waiting, take: Take) -> str | None:
        """See `VllmEngine._sample`; a collective of all ranks, for engines are replaced when all others are done."""
        lost: EngineLost | None = None
        for _ in range(self._section.max_restarts + 1):
            lost = None
            if waiting:
                try:
                    self._sample_once(waiting, take)
                except EngineLost as error:
                    self._lose(lost := error)
                    self._start_early()
            if not any(collectives.all_gather(lost is not None)):
                return None
            assert self._weights is not None
            is_mine = any(self._weights.gather(lost is not None))
            problem = self._refit(self._weights) if is_mine else None
            if problems := [found for found in collectives.all_gather(problem) if found is not None]:
                return problems[0]
        return self._lost_too_often(lost) if waiting else None

    def close(self) -> None:
        """See `VllmBeside.close`."""
        super().close()
        if self._channel is not None:
            self._channel.close()
        self._channel = None
