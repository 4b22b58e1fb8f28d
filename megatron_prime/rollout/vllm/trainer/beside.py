"""vLLM engines in processes beside the trainer, one for each copy of the model, with weights in shared memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from megatron_prime import collectives
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import EngineSetup, ExportedWeights
from megatron_prime.rollout.vllm.trainer.answers import not_finite, raise_for
from megatron_prime.rollout.vllm.trainer.base import Take, VllmEngine, Waiting
from megatron_prime.rollout.vllm.trainer.process import EngineLost, EngineParent, EngineProcess
from megatron_prime.rollout.vllm.trainer.weight_writer import WeightWriter

logger = logging.getLogger(__name__)


class VllmBeside(VllmEngine):
    """vLLM in other processes, one beside each copy of the model, so that a crash there is no crash here.

    The ranks of a model copy write their shards straight into memory that their engine reads: nothing is gathered.
    A lost engine is replaced by a new one that loads the current weights from that memory and samples the answers
    that were still missing; seeds belong to answers, so none is lost, doubled or drawn from other weights.

    Args:
        setup: see `VllmEngine`.
        parent: forks the engines, in place of one of its own; stays open at `close`.
    """

    def __init__(self, setup: EngineSetup, parent: EngineParent | None = None) -> None:
        place = setup.place
        is_leader = place.rank_in_copy == 0
        super().__init__(setup, engine_index=place.copy_index, num_engines=place.num_copies, is_leader=is_leader)
        self._parent = parent
        self._owns_parent = parent is None
        self._process: EngineProcess | None = None
        self._writer: WeightWriter | None = None
        self._version = -1
        """Of the weights that the engine has, or shall have."""
        if is_leader and parent is None:
            self._parent = self._new_parent()

    def _prepare(self, weights: ExportedWeights) -> list[str]:
        if torch.cuda.is_available():
            # What torch keeps for later is lost to an engine on the same GPUs, above all to one that has to start.
            torch.cuda.empty_cache()
        self.prepare(weights)
        return not_finite(self._begin(weights))

    def prepare(self, weights: ExportedWeights) -> None:
        """Makes ready for a set of weights; the first time plans for all; a collective of the copy's ranks."""
        if self._writer is None:
            self._writer = WeightWriter(weights, self._section, is_leader=self._is_leader)

    def _load(self, weights: ExportedWeights, version: int) -> str:
        self._version = version
        raise_for(collectives.all_gather(self._refit(weights)))
        return self._checksum()

    def _begin(self, weights: ExportedWeights) -> list[str]:
        """Looks at what will be loaded; names of this rank's tensors that hold NaN or an infinity."""
        assert self._writer is not None
        return self._writer.begin(weights)

    def close(self) -> None:
        """Ends the engine process and frees the shared memory."""
        super().close()
        if self._process is not None:
            self._process.close()
        if self._parent is not None and self._owns_parent:
            self._parent.close()
        if self._writer is not None:
            self._writer.close()
        self._process = self._parent = self._writer = None

    def process_id(self) -> int | None:
        """Of this rank's engine process, where there is one."""
        return self._process.process_id if self._process is not None else None

    def _checksum(self) -> str:
        assert self._writer is not None
        return self._writer.checksum()

    def _refit(self, weights: ExportedWeights) -> str | None:
        """Has the engine load weights that are prepared for; what went wrong. A collective of the copy's ranks."""
        assert self._writer is not None
        if not self._is_leader:
            self._writer.write(weights)
            return None
        try:
            if self._process is not None:
                # It follows this rank's writing.
                try:
                    self._process.begin_load(self._writer.update, self._version)
                except EngineLost as error:
                    self._lose(error)
            self._writer.write(weights)
            self._with_restarts(self._finish_load)
        except RolloutError as error:
            return str(error)
        return None

    def _finish_load(self) -> None:
        """Returns when the engine holds the current weights."""
        assert self._process is not None
        if self._process.loading == self._version:
            self._process.finish_load()

    def _sample(self, waiting: Waiting, take: Take) -> str | None:
        if not waiting:
            return None
        try:
            self._with_restarts(lambda: self._sample_once(waiting, take))
        except RolloutError as error:
            return str(error)
        return None

    def _sample_once(self, waiting: Waiting, take: Take) -> None:
        """Has the engine sample what waits, until it is lost."""
        assert self._process is not None
        for finished in self._process.generate(list(waiting.values())):
            take(finished)

    def _with_restarts(self, action: Callable[[], None]) -> None:
        """Does something with the engine, on a new one with the current weights whenever one is lost."""
        for attempt in range(self._section.max_restarts + 1):
            try:
                if self._process is None:
                    self._start()
                action()
                return
            except EngineLost as error:
                self._lose(error)
                if attempt == self._section.max_restarts:
                    raise RolloutError(self._lost_too_often(error)) from error

    def _lost_too_often(self, error: Exception | None) -> str:
        times = self._section.max_restarts + 1
        return f"vLLM engine {self._engine_index} was lost {times} times in a row; the last time: {error}"

    def _lose(self, error: Exception) -> None:
        logger.warning("vLLM engine %d was lost: %s", self._engine_index, error)
        if self._process is not None:
            self._process.close()
        self._process = None

    def _start(self) -> None:
        """A new engine process with the current weights."""
        assert self._writer is not None
        self._process = self._new_process()
        self._process.begin_load(self._writer.update, self._version)
        self._process.finish_load()

    def _new_process(self) -> EngineProcess:
        """An engine process without weights."""
        if self._parent is None or not self._parent.is_alive:
            self._parent, self._owns_parent = self._new_parent(), True
        return EngineProcess(self._parent, self._options)

    def _new_parent(self) -> EngineParent:
        place, section = self._setup.place, self._section
        device_ids: Sequence[int] = ()
        if torch.cuda.is_available():
            first = place.device.index or 0
            device_ids = range(first, first + section.tensor_parallel_size)
        num_threads = section.num_threads or self._setup.num_threads * place.ranks_per_copy
        return EngineParent(num_threads, device_ids, section.timeout_seconds)
