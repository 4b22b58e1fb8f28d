"""vLLM engines on other hosts: servers that are told over HTTP and get weights from one process by gloo or NCCL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import torch

from megatron_prime import collectives
from megatron_prime.errors import ConfigError, RolloutError
from megatron_prime.interfaces import EngineSetup, ExportedWeights
from megatron_prime.rollout.vllm.trainer.answers import not_finite, raise_for, request_key
from megatron_prime.rollout.vllm.trainer.base import Take, VllmEngine, Waiting
from megatron_prime.rollout.vllm.trainer.http_client import ServerLost, VllmServer, each, say_progress
from megatron_prime.rollout.vllm.trainer.refit_failures import ServerFailures, servers_at_fault
from megatron_prime.rollout.vllm.trainer.remote_sampling import ServerSampler
from megatron_prime.rollout.vllm.wire.broadcast import Group, TransferAborted
from megatron_prime.rollout.vllm.wire.buckets import BucketSender
from megatron_prime.rollout.vllm.wire.messages import EngineRequest
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, lay_out, whole_tensors
from megatron_prime.weights.digests import find_non_finite

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_MEETING_SECONDS = 60.0


class VllmServers(VllmEngine):
    """vLLM servers, started by `megatron-prime serve` or by others; the main rank asks all of them for all ranks.

    A server that is lost does not stop the run while another one is left: its answers are sampled there (seeds belong
    to answers), and it is asked again at every refit, so that one which was started anew joins with new weights.

    Args:
        setup: see `VllmEngine`.
    """

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup, engine_index=0, num_engines=1, is_leader=collectives.is_main())
        section, on_gpu = self._section, torch.cuda.is_available()
        if section.transfer == "nccl" and not on_gpu:
            raise ConfigError("rollout.vllm.transfer: nccl needs a GPU on this host; use gloo")
        self._urls = tuple(url.rstrip("/") for url in section.servers)
        self._backend: Literal["gloo", "nccl"] = "nccl" if on_gpu and section.transfer != "gloo" else "gloo"
        self._device = torch.device("cpu")
        """Where buckets lie."""
        if self._backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._plan: SharedPlan | None = None
        self._members: tuple[str, ...] = ()
        """Servers in the sender's group, which hold the latest weights if any are loaded."""
        self._sender: BucketSender | None = None
        self._group: Group | None = None
        self._ranks: dict[str, int] = {}
        """Of each server's first worker in the group."""
        self._has_met = False
        self._version = -1
        """Of the weights that the members hold; -1: not known."""
        self._first_failed: list[str] = []
        """Servers that failed in the current attempt when nobody had given up yet."""
        self._failures = ServerFailures(section.max_restarts)

    def _prepare(self, weights: ExportedWeights) -> list[str]:
        return not_finite(find_non_finite(weights.slices()))

    def _load(self, weights: ExportedWeights, version: int) -> str:
        if self._plan is None:
            self._plan = whole_tensors(lay_out(weights.tensors()))
        self._failures.begin()
        while True:
            problem = _problem_of(self._connect()) if self._is_leader else None
            raise_for([collectives.broadcast(problem)])
            checksum = None
            if self._is_leader:
                checksum = asyncio.run(say_progress(self._refit(weights, version)))
            elif self._setup.place.copy_index == 0:
                # The leader's copy, whose tensors it gathers.
                _drain(weights)
            if (checksum := collectives.broadcast(checksum)) is not None:
                return checksum
            logger.warning("weights of version %d: an attempt to load them failed", version)

    def close(self) -> None:
        """Leaves the servers running: they were not started here."""
        super().close()
        self._sender = self._group = None

    async def _connect(self) -> None:
        """Has a group of all servers that are there; a new one if it changed or one of them was started anew."""
        async with self._client() as client:
            while True:
                if (reason := self._failures.give_up()) is not None:
                    raise RolloutError(f"the vLLM servers took no weights: {reason}")
                servers, held = await self._available_servers(client)
                urls = tuple(server.url for server in servers)
                if self._sender is not None and urls == self._members and held == {str(self._version)}:
                    return
                if await self._meet(servers):
                    return

    async def _available_servers(self, client: aiohttp.ClientSession) -> tuple[list[VllmServer], set[str | None]]:
        """The servers that answer and have not failed too often, and the versions of their weights."""
        excluded = self._failures.excluded()
        servers = self._servers(client, (url for url in self._urls if url not in excluded))
        # The first time all must come: a run should not start on half of its servers.
        patience = 0.0 if self._has_met else self._section.timeout_seconds
        versions = await _wait_for(servers, patience)
        there = [server for server in servers if versions[server.url] is not None]
        absent = [server.url for server in servers if server not in there]
        missing = [url for url in self._urls if url in excluded or url in absent]
        if not there or (not self._has_met and missing):
            raise RolloutError("rollout.vllm.servers: " + "\n".join(self._reasons_missing(missing, absent)))
        if absent:
            logger.warning("vLLM servers that do not answer: %s", ", ".join(absent))
        return there, {versions[server.url] for server in there}

    def _reasons_missing(self, missing: Sequence[str], absent: Sequence[str]) -> list[str]:
        """Why each of these servers cannot be used."""
        silence = "no answer to /health and /weight_info; start it with `megatron-prime serve CONFIG --port PORT`"
        return [
            f"{url}: {silence if url in absent else f'left out after its last failure: {self._failures.last(url)}'}"
            for url in missing
        ]

    async def _meet(self, servers: Sequence[VllmServer]) -> bool:
        """Makes a new group of the sender and every worker of these servers; False: some of them failed."""
        assert self._plan is not None
        section, longest = self._section, self._options.max_model_len
        self._members, self._sender, self._group, self._version = (), None, None, -1
        failed, lengths = await each(servers, VllmServer.max_model_len)
        failed |= {
            url: f"{url} takes {length} tokens at most, rollout.vllm.max_model_len is {longest}; "
            "start it with this run's configuration"
            for url, length in lengths.items()
            if length < longest
        }
        silent, num_workers = await each(servers, VllmServer.num_workers)
        if failed := failed | silent:
            return self._meeting_failed(failed, None)
        ranks = dict(zip(num_workers, accumulate(num_workers.values(), initial=1), strict=False))
        size, port = 1 + sum(num_workers.values()), _free_port()
        meeting = {
            "backend": self._backend,
            "port": port,
            "size": size,
            "entries": [[entry.name, list(entry.shape), entry.dtype, entry.offset] for entry in self._plan.entries],
            "bucket_bytes": self._bucket_bytes,
            "compare_digests": section.verify_refit,
            "timeout_seconds": min(_MEETING_SECONDS, section.timeout_seconds),
        }
        place = ("0.0.0.0", port, 0, size, meeting["timeout_seconds"])
        is_cancelled = threading.Event()
        own = asyncio.create_task(
            asyncio.to_thread(Group, self._backend, *place, self._device, is_cancelled=is_cancelled.is_set)
        )

        async def meet(server: VllmServer) -> None:
            try:
                await server.meet(meeting | {"address": _address_towards(server.url), "first_rank": ranks[server.url]})
            except ServerLost:
                is_cancelled.set()
                raise

        # All are waited for, also when one has failed: the others are busy until they give up.
        failed, _ = await each(servers, meet)
        try:
            group = await own
        except RuntimeError as error:
            return self._meeting_failed(failed, error)
        if failed:
            return self._meeting_failed(failed, None)
        buckets = [torch.empty(self._bucket_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._group, self._ranks = group, ranks
        self._sender = BucketSender(self._plan, group, buckets, with_digests=section.verify_refit)
        self._members, self._has_met = tuple(server.url for server in servers), True
        return True

    def _meeting_failed(self, failed: dict[str, str], error: RuntimeError | None) -> bool:
        reason = "; ".join(["the vLLM servers and the trainer did not come together", *failed.values()])
        reason += f"; the trainer: {error}" if error else ""
        logger.warning("%s", reason)
        # If the trainer itself could not begin, that is why the others could not.
        is_own = error is not None and not isinstance(error, TransferAborted)
        self._failures.add({} if is_own else servers_at_fault(failed, None, []), reason=reason)
        return False

    async def _refit(self, weights: ExportedWeights, version: int) -> str | None:
        """Sends one set of weights; the checksum of all, or None and one more failure of each that failed."""
        assert self._group is not None
        self._version, self._first_failed = -1, []
        async with self._client() as client:
            servers = self._servers(client, self._members)
            failed, _ = await each(servers, VllmServer.start_load)
            # Weights are sent to all servers or to none: those that are ready wait for them.
            checksum = None
            if failed:
                _drain(weights)
            else:
                sending = asyncio.create_task(asyncio.to_thread(self._send, weights))
                failed, _ = await each(servers, self._receive)
                checksum = await sending
            if not failed and checksum is not None:
                failed, _ = await each(servers, lambda server: server.finish_load(version))
        if failed or checksum is None:
            for text in failed.values():
                logger.warning("a vLLM server failed in a refit: %s", text)
            culprits = servers_at_fault(failed, self._server_of(self._group.given_up_by()), self._first_failed)
            self._failures.add(culprits, reason="sending them failed; the reason is above")
            # The other servers are in the middle of a load; a new group ends it.
            self._sender = self._group = None
            return None
        self._failures.succeeded(self._members)
        self._version = version
        return checksum

    def _server_of(self, rank: int | None) -> str | None:
        """The server of a worker; None: the sender, or nobody."""
        urls = [url for url, first in self._ranks.items() if rank is not None and first <= rank]
        return urls[-1] if urls else None

    async def _receive(self, server: VllmServer) -> None:
        """Has a server take what is sent; if it does not, nobody shall wait for it."""
        assert self._group is not None
        try:
            await server.load()
        except ServerLost:
            if self._group.given_up_by() is None:
                self._first_failed.append(server.url)
            self._group.abort()
            raise

    def _send(self, weights: ExportedWeights) -> str | None:
        """Sends all weights; None: a receiver was lost. Reads them to their end in any case, as the other ranks do."""
        assert self._sender is not None and self._group is not None
        stream = iter(weights)
        try:
            return self._sender.send(stream)
        except RuntimeError as error:
            logger.warning("sending weights failed: %s", error)
            # The other receivers would wait for the rest.
            self._group.abort()
            return None
        finally:
            _drain(stream)

    def _sample(self, waiting: Waiting, take: Take) -> str | None:
        return _problem_of(self._sample_all(waiting, take)) if waiting else None

    async def _sample_all(self, waiting: Waiting, take: Take) -> None:
        async with self._client() as client:
            left = self._servers(client, self._members)
            while waiting and left:
                shares: list[list[EngineRequest]] = [[] for _ in left]
                for request_id, request in waiting.items():
                    # A prompt's answers share a server and, there, what was computed for the prompt.
                    shares[request_key(request_id)[0] % len(left)].append(request)
                samplers = [ServerSampler(server, self._section, version=self._version) for server in left]
                lost = await asyncio.gather(
                    *(sampler.run(share, take) for sampler, share in zip(samplers, shares, strict=True))
                )
                for error in filter(None, lost):
                    logger.warning("a vLLM server was lost: %s", error)
                left = [server for server, error in zip(left, lost, strict=True) if error is None]
        if waiting:
            raise RolloutError(f"all vLLM servers are lost ({', '.join(self._urls)}); the reasons are above")

    def _servers(self, client: aiohttp.ClientSession, urls: Iterable[str]) -> list[VllmServer]:
        return [VllmServer(url, client, self._section.timeout_seconds) for url in urls]

    def _client(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def _wait_for(servers: Sequence[VllmServer], patience_seconds: float) -> dict[str, str | None]:
    """The version that each server holds, None for those that do not come within the time."""
    deadline = time.monotonic() + patience_seconds
    while True:
        versions = await asyncio.gather(*(server.version() for server in servers))
        if None not in versions or time.monotonic() >= deadline:
            return {server.url: version for server, version in zip(servers, versions, strict=True)}
        await asyncio.sleep(_POLL_SECONDS)


def _problem_of(action: Coroutine[Any, Any, None]) -> str | None:
    try:
        asyncio.run(say_progress(action))
    except (RolloutError, ServerLost) as error:
        return str(error)
    return None


def _drain(stream: Iterable[Any]) -> None:
    for _ in stream:
        pass


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _address_towards(url: str) -> str:
    """This host's address as the server sees it."""
    parts = urlsplit(url)
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        # Nothing is sent: connecting a datagram socket only looks up the route.
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
