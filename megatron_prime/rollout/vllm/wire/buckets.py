"""A set of weights as a stream of bytes in two buckets: packed by one process, unpacked by others, on any device.

The stream is the byte image of a plan's tensors with the trainer's checksums behind them, cut into pieces of equal
size. How a piece gets from process to process is a `Channel`'s business: a broadcast (`broadcast`) or memory that
processes on one host share (`ipc`). Neither side holds more than two buckets beside the tensor in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, TensorEntry, aligned, num_bytes_of
from megatron_prime.weights.digests import NUM_DIGEST_BYTES, digest, digest_on


class Channel(Protocol):
    """One end of the way between processes; both ends name the same pieces in the same order."""

    def begin(self, data: Tensor) -> Any:
        """Starts to send these bytes, or to receive them here."""
        ...

    def wait(self, work: Any) -> None:
        """Returns when what `begin` started is done.

        Raises:
            RuntimeError: the other side is gone or silent, or gave up.
        """
        ...


def _stream_entries(plan: SharedPlan) -> tuple[TensorEntry, ...]:
    """The plan's tensors and, behind them, the checksums."""
    start = aligned(num_bytes_of(plan.entries))
    return *plan.entries, TensorEntry("", (len(plan.entries), NUM_DIGEST_BYTES), "uint8", start)


class BucketSender:
    """Sends complete sets of weights in the order of a plan.

    Args:
        plan: the tensors.
        channel: takes the buckets.
        buckets: two of equal size, which is a multiple of 64 bytes.
        with_digests: send checksums of the tensors, not zeros.
    """

    def __init__(self, plan: SharedPlan, channel: Channel, buckets: Sequence[Tensor], *, with_digests: bool) -> None:
        self._entries = _stream_entries(plan)
        self._channel = channel
        self._buckets = buckets
        self._with_digests = with_digests
        self._works: list[Any] = [None, None]

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Sends every tensor and then the checksums.

        Args:
            weights: (name, whole tensor), exactly those of the plan in its order.

        Returns:
            Checksum of the checksums.

        Raises:
            RuntimeError: a receiver is gone or silent.
        """
        self._works = [None, None]
        *entries, last = self._entries
        digests = []
        position = 0
        for entry, (name, tensor) in zip(entries, weights, strict=True):
            assert name == entry.name and tuple(tensor.shape) == entry.shape
            # Packed first: the checksum is computed while the bucket before is on its way.
            position = self._pack(tensor.detach(), entry.offset, position)
            digests.append(self._digest(tensor))
        sums = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
        position = self._pack(sums, last.offset, position)
        if position % len(self._buckets[0]):
            self._launch(position)
        for side in range(2):
            self._free(side)
        return digest(sums).hex()

    def _digest(self, tensor: Tensor) -> bytes:
        return digest_on(self._buckets[0].device, tensor) if self._with_digests else bytes(NUM_DIGEST_BYTES)

    def _pack(self, tensor: Tensor, offset: int, position: int) -> int:
        """Writes a tensor where it lies in the stream, launching what is full; where it ends."""
        size = len(self._buckets[0])
        # Between two tensors is a gap whose content does not matter; it may end a bucket.
        if offset // size > position // size and position % size:
            self._launch(offset // size * size)
        position = offset
        data = tensor.contiguous().view(-1).view(torch.uint8)
        while len(data):
            side, start = position // size % 2, position % size
            count = min(size - start, len(data))
            if start == 0:
                self._free(side)
            self._buckets[side][start : start + count].copy_(data[:count])
            data, position = data[count:], position + count
            if position % size == 0:
                self._launch(position)
        return position

    def _launch(self, stop: int) -> None:
        """Sends the bucket that ends (for now) at this place of the stream."""
        size = len(self._buckets[0])
        number, num_bytes = (stop - 1) // size, (stop - 1) % size + 1
        self._works[number % 2] = self._channel.begin(self._buckets[number % 2][:num_bytes])

    def _free(self, side: int) -> None:
        if self._works[side] is not None:
            self._channel.wait(self._works[side])
            self._works[side] = None


class BucketReceiver:
    """Receives sets of weights, one bucket ahead of whoever reads them.

    Args:
        plan: the sender's.
        channel: brings the buckets.
        bucket_bytes: the sender's.
        device: where tensors shall lie.
        keeps_all: has room for the whole stream, and tensors stay until the next set; otherwise for two buckets.
    """

    def __init__(
        self, plan: SharedPlan, channel: Channel, bucket_bytes: int, device: torch.device, *, keeps_all: bool
    ) -> None:
        self._entries = _stream_entries(plan)
        self._channel = channel
        self._size = bucket_bytes
        self._num_bytes = num_bytes_of(self._entries)
        self._keeps_all = keeps_all
        room = self._num_bytes if keeps_all else 2 * bucket_bytes
        self._memory = torch.empty(room, dtype=torch.uint8, device=device)
        self.digests = torch.empty(0)
        """Checksums [tensors, bytes] of the last set, when it has been read to its end."""

    def __iter__(self) -> Iterator[list[tuple[str, Tensor]]]:
        """(Name, tensor) of all tensors, bucket by bucket those that it completes.

        Without `keeps_all` a bucket's tensors are valid until the next step.

        Raises:
            RuntimeError: the sender, or another receiver, is gone or silent.
        """
        waiting = list(reversed(self._entries))
        part: Tensor | None = None
        work = self._channel.begin(self._window(0))
        for start in range(0, self._num_bytes, self._size):
            self._channel.wait(work)
            stop = min(start + self._size, self._num_bytes)
            if stop < self._num_bytes:
                work = self._channel.begin(self._window(stop))
            complete: list[tuple[str, Tensor]] = []
            while waiting and waiting[-1].end <= stop:
                entry = waiting.pop()
                complete.append((entry.name, entry.view(self._take(entry, start, stop, part))))
                part = None
            if waiting and waiting[-1].offset < stop:
                part = self._take(waiting[-1], start, stop, part)
            if not waiting:
                self.digests = complete.pop()[1]
            yield complete

    def _window(self, start: int) -> Tensor:
        """Where the bucket that starts here is put."""
        place = start if self._keeps_all else start % (2 * self._size)
        return self._memory[place : place + min(self._size, self._num_bytes - start)]

    def _take(self, entry: TensorEntry, start: int, stop: int, part: Tensor | None) -> Tensor:
        """A tensor's bytes, as far as they are there: in the memory, or (of several buckets) in one of their own."""
        if self._keeps_all:
            return self._memory[entry.offset : entry.end]
        first, last = max(entry.offset, start), min(entry.end, stop)
        here = self._window(start)[first - start : last - start]
        if last - first == entry.num_bytes:
            return here
        if part is None:
            part = torch.empty(entry.num_bytes, dtype=torch.uint8, device=here.device)
        part[first - entry.offset : last - entry.offset].copy_(here)
        return part
