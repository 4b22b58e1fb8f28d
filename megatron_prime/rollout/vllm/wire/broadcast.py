"""Weights over the network: one trainer process sends, every worker of every engine receives, by gloo or NCCL."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

SENDER = 0
"""Rank of the trainer's process in the group."""
ABORTED_PREFIX = "others broke off the exchange of weights"
"""Begins the error of a member that only waited for the others."""
_ABORTED, _HERE = "aborted", "here"
_LOOK_SECONDS, _POLL_SECONDS, _MEET_SECONDS = 0.5, 0.0002, 0.05

_abandoned: list[Any] = []
"""Gloo groups with a bucket on its way that will never come: to free one takes until gloo's time-out."""


class TransferAborted(RuntimeError):
    """A member is gone or silent, or somebody gave up: it is not this one's fault."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"{ABORTED_PREFIX}: {reason}")


class Group:
    """A group beside the default one (`buckets.Channel`); constructed when all members are there.

    Args:
        backend: ``gloo`` between host memories, ``nccl`` between GPUs.
        address: of the sender.
        port: that the sender listens on.
        rank: of this process.
        size: number of members.
        timeout_seconds: for the meeting and for each bucket.
        device: of this process's buckets.
        is_cancelled: asked until all are there; true: one is known not to come.

    Raises:
        TransferAborted: a member did not come.
        RuntimeError: the sender is not to be reached.
    """

    def __init__(
        self,
        backend: Literal["gloo", "nccl"],
        address: str,
        port: int,
        rank: int,
        size: int,
        timeout_seconds: float,
        device: torch.device,
        is_cancelled: Callable[[], bool] = bool,
    ) -> None:
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)
        self._store: Any = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, size, is_master=rank == SENDER, timeout=timeout, wait_for_workers=False
        )
        # For a member that is missing the backends would wait until their time-outs, NCCL without one.
        self._wait_for_all(size, is_cancelled)
        prefix = dist.PrefixStore("megatron_prime_weights", self._store)  # pyright: ignore[reportPrivateImportUsage]
        self._is_gloo = backend == "gloo"
        if self._is_gloo:
            try:
                self._group: Any = dist.ProcessGroupGloo(prefix, rank, size, timeout)
            except RuntimeError as error:
                raise TransferAborted(error) from error
        else:
            options = dist.ProcessGroupNCCL.Options()
            # When this time is up NCCL ends the process; `wait` gives up long before.
            options._timeout = 10 * timeout
            self._group = dist.ProcessGroupNCCL(prefix, rank, size, options)
            # NCCL connects at the first use: who is missing shall be missed here.
            self.wait(self.begin(torch.zeros(1, dtype=torch.uint8, device=device)))

    def begin(self, data: torch.Tensor) -> Any:
        """Starts to send these bytes (the sender) or to receive them.

        Raises:
            TransferAborted: a member is gone.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        try:
            return self._group.broadcast([data], options)
        except RuntimeError as error:
            raise TransferAborted(error) from error

    def wait(self, work: Any) -> None:
        """Returns when what `begin` started is done.

        Raises:
            TransferAborted: a member is gone or silent, or somebody gave up.
        """
        begun = look = time.monotonic()
        while not work.is_completed():
            if (now := time.monotonic()) > look:
                # The backends themselves would wait for their time-outs: a lost receiver is no loss to the other ones.
                if (culprit := self.given_up_by()) is not None:
                    self._abandon()
                    raise TransferAborted(_gave_up(culprit))
                if now > begun + self._timeout_seconds:
                    self._abandon()
                    raise TransferAborted(f"no bucket for {self._timeout_seconds:g} seconds")
                look = now + _LOOK_SECONDS
            time.sleep(_POLL_SECONDS)
        try:
            work.wait()
        except RuntimeError as error:
            raise TransferAborted(error) from error

    def abort(self) -> None:
        """Has everyone who waits give up."""
        self._store.compare_set(_ABORTED, "", str(self._rank))

    def given_up_by(self) -> int | None:
        """Rank of the first who gave up; None: nobody has."""
        return int(self._store.get(_ABORTED)) if self._store.check([_ABORTED]) else None

    def _wait_for_all(self, size: int, is_cancelled: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        try:
            num_here = self._store.add(_HERE, 1)
            while num_here < size:
                if is_cancelled():
                    self.abort()
                if (culprit := self.given_up_by()) is not None:
                    raise TransferAborted(_gave_up(culprit))
                if time.monotonic() > deadline:
                    raise TransferAborted(f"{num_here} of {size} members came within {self._timeout_seconds:g} seconds")
                time.sleep(_MEET_SECONDS)
                num_here = self._store.add(_HERE, 0)
        except dist.DistError as error:
            # The sender's process keeps the store.
            raise TransferAborted(error) from error

    def _abandon(self) -> None:
        if self._is_gloo:
            _abandoned.append(self._group)
        else:
            self._group.abort()


def _gave_up(rank: int) -> str:
    return "the sender gave up" if rank == SENDER else f"rank {rank} gave up"
