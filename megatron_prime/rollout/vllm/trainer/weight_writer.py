"""The trainer's side of a refit: from the ranks of one model copy into the memory that their engine reads."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_prime.config.schema import VllmSection
from megatron_prime.interfaces import ExportedWeights
from megatron_prime.rollout.vllm.wire.messages import SharedUpdate
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, lay_out
from megatron_prime.weights.digests import NUM_DIGEST_BYTES, digest, examine, find_non_finite
from megatron_prime.weights.shards import Ranges, ShardSlice, cut, cut_for_workers

_MAX_THREADS = 4
"""That examine a rank's weights: reading is limited by memory, not by cores."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank tells the others of its model copy."""

    path: str | None
    """Of the memory; the leader's."""
    host: str
    process_id: int
    slices: list[tuple[str, Ranges]]


class WeightWriter:
    """Writes a model copy's weights, planned once and used for every refit.

    Ranks on one host each write their own shards: nothing is gathered, and no rank holds more than its shard. Where
    the ranks are on several hosts, whole tensors are gathered one at a time and the leader writes them.

    Args:
        weights: of this rank's model, for their layout; all ranks of the copy construct their writers together.
        section: of the engine: how many workers it has (at their shares the slices that have checksums end), whether
            checksums of the trainer's values are written, and how long it waits for a rank to write on.
        is_leader: the rank beside the engine; one per copy.

    Raises:
        WeightsError: on every rank alike, the ranks' shards are not exactly the model.
        RolloutError: there is not enough memory.
    """

    def __init__(self, weights: ExportedWeights, section: VllmSection, *, is_leader: bool) -> None:
        self._num_workers = section.tensor_parallel_size
        self._with_digests = section.verify_refit
        self._sums = b""
        """Of this rank's slices."""
        tensors = weights.tensors()
        entries = lay_out(tensors)
        self._shapes = {name: shape for name, shape, _ in tensors}
        host, own = socket.gethostname(), [(part.name, part.ranges) for part in self._slices(weights)]
        hosts = {offer.host for offer in weights.gather(_Offer(None, host, os.getpid(), []))}
        self.gathers = len(hosts) > 1
        """Whether the copy's ranks are on several hosts, so that its leader writes for all."""
        if self.gathers:
            own = [(name, tuple((0, size) for size in shape)) for name, shape, _ in tensors] if is_leader else []
        everyones = weights.gather(_Offer(None, host, os.getpid(), own))
        writers = [offer for offer in everyones if offer.slices or not self.gathers]
        self.plan = SharedPlan(entries, tuple(s for offer in writers for s in offer.slices), len(writers))
        offered = SharedWeights(self.plan) if is_leader else None
        paths = weights.gather(_Offer(offered.path if offered else None, host, os.getpid(), []))
        self.path: str = next(offer.path for offer in paths if offer.path is not None)
        self.memory: SharedWeights | None = offered
        """None where this rank does not write."""
        if offered is None and not self.gathers:
            self.memory = SharedWeights(self.plan, self.path)
        me = (host, os.getpid())
        places = [(offer.host, offer.process_id) for offer in writers]
        self._writer = places.index(me) if me in places else 0
        self._first_slice = sum(len(offer.slices) for offer in writers[: self._writer])
        self._position = {entry.name: number for number, entry in enumerate(entries)}
        self.update = SharedUpdate(
            path=self.path,
            plan=self.plan,
            compare_digests=section.verify_refit,
            timeout_seconds=section.timeout_seconds,
        )
        """What the engine is told."""

    def begin(self, weights: ExportedWeights) -> list[str]:
        """Looks at what will be written, and takes back what was said of the last refit.

        Args:
            weights: of the layout that the writer was constructed with.

        Returns:
            Names of this rank's tensors that hold NaN or an infinity. `write` of any rank must come after all ranks'
            `begin`.
        """
        self._report_progress(0)
        if self.gathers or not self._with_digests:
            return find_non_finite(weights.slices())
        # The engine's cores have nothing to do yet.
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.plan.num_writers))
        num_threads = min(len(os.sched_getaffinity(0)) // num_ranks, _MAX_THREADS)
        self._sums, found = examine(self._slices(weights), max(num_threads, 1))
        return found

    def write(self, weights: ExportedWeights) -> None:
        """Writes this rank's part, telling the engine how far it is; a collective where tensors are gathered.

        Args:
            weights: those that `begin` has looked at.
        """
        if self.gathers:
            self._write_gathered(weights)
            return
        assert self.memory is not None
        for part in weights.slices():
            self._report_progress(self._position[part.name])
            cut(self.memory.tensors[part.name], part.ranges).copy_(part.values)
        if self._sums:
            sums = torch.frombuffer(bytearray(self._sums), dtype=torch.uint8).view(-1, NUM_DIGEST_BYTES)
            self.memory.digests[self._first_slice : self._first_slice + len(sums)] = sums
        self._report_progress(len(self._position) + 1)

    def checksum(self) -> str:
        """Of the checksums of all parts; on ranks that do not write, of nothing."""
        return digest(self.memory.digests).hex() if self.memory is not None else ""

    def close(self) -> None:
        """Unmaps the memory."""
        if self.memory is not None:
            self.memory.close()

    def _slices(self, weights: ExportedWeights) -> Iterator[ShardSlice]:
        """What has a checksum of its own."""
        for part in weights.slices():
            yield from cut_for_workers(part, self._shapes[part.name][part.dim], self._num_workers)

    def _write_gathered(self, weights: ExportedWeights) -> None:
        for number, (name, tensor) in enumerate(weights):
            if self.memory is not None:
                self.memory.tensors[name].copy_(tensor)
                if self._with_digests:
                    sums = bytearray(digest(tensor))
                    self.memory.digests[number] = torch.frombuffer(sums, dtype=torch.uint8)
                self._report_progress(number + 1)
        self._report_progress(len(self._position) + 1)

    def _report_progress(self, num_tensors: int) -> None:
        if self.memory is not None:
            self.memory.progress[self._writer] = num_tensors
