"""Sampling on one vLLM server: what time cuts off, whose weights the answers are of, and when it counts as lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.trainer.http_client import ServerLost, VllmServer
from megatron_prime.rollout.vllm.wire.messages import EngineRequest, Finished

_POLL_SECONDS = 1.0


class ServerSampler:
    """Samples a share of the answers on one server.

    Args:
        server: samples.
        section: how many answers it samples at the same time, when those that are not finished are cut off, and the
            longest time without an answer or, as far as it says, a token.
        version: of the weights that it is to sample with.
    """

    def __init__(self, server: VllmServer, section: VllmSection, *, version: int) -> None:
        self._server = server
        self._version = version
        # The next answers are already there when one has ended.
        self._places = asyncio.Semaphore(2 * section.max_num_seqs)
        self._timeout_seconds = section.timeout_seconds
        self._abort_after_seconds = section.abort_after_seconds
        self._start = self._heard = self._asked = time.monotonic()
        """When it began, was last known to make progress, and was last asked whether it does."""
        self._num_tokens: float | None = None
        self._num_unlimited = 0
        """Requests under way that may go on for long."""

    async def run(self, requests: Sequence[EngineRequest], take: Callable[[Finished], None]) -> ServerLost | None:
        """Samples until all is done or the server is lost, and says why; answers that came until then count.

        Args:
            requests: what to sample.
            take: is called with each answer when it is there.
        """
        tasks = [asyncio.create_task(self._one(request, take)) for request in requests]
        running: set[asyncio.Task[None]] = set(tasks)
        try:
            while running:
                ended, running = await asyncio.wait(running, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                for task in ended:
                    task.result()
                # It cuts off all that the server samples: what is short must be let through when the rest is gone.
                if self._num_unlimited and self._is_late():
                    await self._server.abort()
                if running:
                    await self._listen()
        except ServerLost as error:
            return error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None

    async def _one(self, request: EngineRequest, take: Callable[[Finished], None]) -> None:
        async with self._places:
            finished = None if self._is_late() else await self._unlimited(request)
            # Time was up before its first token; no answer is empty. The replacement may be cut off with others.
            while finished is None or not finished.token_ids:
                finished = await self._server.sample(replace(request, max_tokens=1))
        if set(finished.weight_versions) != {self._version}:
            raise ServerLost(
                f"{self._server.url}: sampled with weights {finished.weight_versions}, not {self._version}"
            )
        self._heard = time.monotonic()
        take(finished)

    async def _unlimited(self, request: EngineRequest) -> Finished:
        self._num_unlimited += 1
        try:
            return await self._server.sample(request)
        finally:
            self._num_unlimited -= 1

    async def _listen(self) -> None:
        """Asks a server that has not answered for a while whether it samples at all: a long answer is no silence.

        Its health would not do: a server whose engine hangs is as healthy as any.
        """
        if (now := time.monotonic()) - max(self._heard, self._asked) > self._timeout_seconds / 4:
            self._asked = now
            num_tokens = await self._server.num_tokens()
            if num_tokens is not None and num_tokens != self._num_tokens:
                # The first number counts as progress: there is none to compare it with.
                self._num_tokens, self._heard = num_tokens, time.monotonic()
        if time.monotonic() - self._heard > self._timeout_seconds:
            raise ServerLost(f"{self._server.url}: no answer and no token for {self._timeout_seconds:g} seconds")

    def _is_late(self) -> bool:
        limit = self._abort_after_seconds
        return limit is not None and time.monotonic() - self._start > limit
