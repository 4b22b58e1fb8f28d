"""A whole set of weights over the network: one trainer process sends, every worker of every engine receives.

What travels is the byte image of a `SharedPlan`, cut into buckets of equal size. The sender packs one bucket while
the one before is on its way; receivers have buckets written straight to where the tensors lie.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.rollout.vllm.shared_weights import SharedPlan, SharedWeights
from megatron_prime.weights.shards import digest

SENDER = 0
"""Rank of the trainer's process in the group."""
_ABORTED = "aborted"
_LOOK_SECONDS, _POLL_SECONDS = 0.5, 0.0002

_abandoned: list[Any] = []
"""Groups with a bucket on its way that will never come: to free one takes until gloo's time-out."""


class Group:
    """A gloo group beside the default one; constructed when all members are there.

    Args:
        address: of the sender.
        port: that the sender listens on.
        rank: of this process.
        size: number of members.
        timeout_seconds: for the meeting and for each bucket.

    Raises:
        RuntimeError: a member did not come.
    """

    def __init__(self, address: str, port: int, rank: int, size: int, timeout_seconds: float) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        self._store: Any = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, size, is_master=rank == SENDER, timeout=timeout, wait_for_workers=False
        )
        prefix = dist.PrefixStore("megatron_prime_weights", self._store)  # pyright: ignore[reportPrivateImportUsage]
        self._gloo: Any = dist.ProcessGroupGloo(prefix, rank, size, timeout)

    def begin(self, data: torch.Tensor) -> Any:
        """Starts to send these bytes (the sender) or to receive them."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        return self._gloo.broadcast([data], options)

    def wait(self, work: Any) -> None:
        """Returns when what `begin` started is done.

        Raises:
            RuntimeError: a member is gone or silent, or the sender gave up.
        """
        look = time.monotonic() + _LOOK_SECONDS
        while not work.is_completed():
            if time.monotonic() > look:
                # Gloo itself would wait for its time-out: a lost receiver is no loss to the other ones.
                if self._store.check([_ABORTED]):
                    _abandoned.append(self._gloo)
                    raise RuntimeError("the sender gave up")
                look = time.monotonic() + _LOOK_SECONDS
            time.sleep(_POLL_SECONDS)
        work.wait()

    def abort(self) -> None:
        """Has everyone who waits give up."""
        self._store.set(_ABORTED, "1")


class BucketSender:
    """Sends complete sets of weights in the order of a plan.

    Args:
        plan: the tensors; one slice per tensor, whose checksum is sent behind them.
        group: of which this process is a member.
        bucket_bytes: size of each of the two buckets.
    """

    def __init__(self, plan: SharedPlan, group: Group, bucket_bytes: int) -> None:
        self._plan = plan
        self._group = group
        self._buckets = [torch.empty(bucket_bytes, dtype=torch.uint8) for _ in range(2)]
        self._works: list[Any] = [None, None]

    def send(self, weights: Iterable[tuple[str, torch.Tensor]]) -> bytes:
        """Sends every tensor and then the checksums.

        Args:
            weights: (name, whole tensor), exactly those of the plan in its order.

        Returns:
            The checksums, one after the other.

        Raises:
            RuntimeError: a receiver is gone or silent.
        """
        size = len(self._buckets[0])
        position, digests = 0, []
        for entry, (name, tensor) in zip(self._plan.entries, weights, strict=True):
            assert name == entry.name and tuple(tensor.shape) == entry.shape
            digests.append(digest(tensor))
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            # Tensors are aligned: between two of them is a gap whose content does not matter.
            position = self._skip(position, entry.offset, size)
            while len(data):
                number, start = divmod(position, size)
                count = min(size - start, len(data))
                self._free(number, start)[start : start + count] = data[:count]
                data, position = data[count:], position + count
                if position % size == 0:
                    self._launch(number, size)
        if position % size:
            self._launch(position // size, position % size)
        sums = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
        self._wait()
        self._group.wait(self._group.begin(sums))
        return b"".join(digests)

    def abort(self) -> None:
        """Has the receivers give up."""
        self._group.abort()

    def _skip(self, position: int, offset: int, size: int) -> int:
        if offset // size > position // size and position % size:
            self._launch(position // size, size)
        return offset

    def _free(self, number: int, start: int) -> torch.Tensor:
        """The bucket with this number, no longer on its way."""
        side = number % 2
        if start == 0 and self._works[side] is not None:
            self._group.wait(self._works[side])
            self._works[side] = None
        return self._buckets[side]

    def _launch(self, number: int, num_bytes: int) -> None:
        side = number % 2
        self._works[side] = self._group.begin(self._buckets[side][:num_bytes])

    def _wait(self) -> None:
        for side, work in enumerate(self._works):
            if work is not None:
                self._group.wait(work)
            self._works[side] = None


class BucketReceiver:
    """Receives sets of weights into memory of the same plan, a bucket ahead of whoever reads them.

    Args:
        weights: where they go.
        group: of which this process is a member.
        bucket_bytes: the sender's.
    """

    def __init__(self, weights: SharedWeights, group: Group, bucket_bytes: int) -> None:
        self._weights = weights
        self._group = group
        self._bucket_bytes = bucket_bytes
        self._ends = [entry.offset + entry.num_bytes for entry in weights.plan.entries]
        self._received = self._expected = self._ends[-1]
        self._work: Any = None

    def begin(self) -> None:
        """The sender starts a new set."""
        self._received = self._expected = 0
        self._next()

    def wait(self, num_tensors: int) -> None:
        """Returns when the first `num_tensors` tensors are complete.

        Raises:
            RuntimeError: the sender, or another receiver, is gone or silent.
        """
        while self._received < self._ends[num_tensors - 1]:
            self._group.wait(self._work)
            self._received = self._expected
            self._next()

    def finish(self) -> None:
        """Takes the checksums; what is in the memory is then complete."""
        self.wait(len(self._ends))
        self._group.wait(self._group.begin(self._weights.digests.view(-1)))
        self._weights.progress.fill_(len(self._ends) + 1)

    def _next(self) -> None:
        if self._expected < self._ends[-1]:
            stop = min(self._expected + self._bucket_bytes, self._ends[-1])
            self._work = self._group.begin(self._weights.image[self._expected : stop])
            self._expected = stop
