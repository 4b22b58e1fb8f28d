"""The vLLM engine on other hosts: servers that are told over HTTP and get weights from one process by gloo or NCCL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
import torch

from megatron_prime import world
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.prompts import check_prompts
from megatron_prime.rollout.protocol import ExportedWeights, OnAnswer
from megatron_prime.rollout.vllm.answers import make_request, not_finite, raise_for, raise_together, to_response
from megatron_prime.rollout.vllm.broadcast import Group
from megatron_prime.rollout.vllm.buckets import BucketSender
from megatron_prime.rollout.vllm.http import ServerLost, VllmServer
from megatron_prime.rollout.vllm.messages import EngineRequest, Finished
from megatron_prime.rollout.vllm.shared_weights import SharedPlan, lay_out, whole_tensors
from megatron_prime.weights.digests import find_non_finite

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_POLL_SECONDS = 1.0
_MEETING_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServersSetup:
    """Which servers there are and what they are asked for."""

    urls: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    """Answers that one server samples at the same time."""
    end_token_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    """Tokens of an answer (without the token that ended it) to text."""
    holds_copy: bool
    """Whether this rank belongs to the model copy that is sent; global rank 0 does, and sends it."""
    transfer: Literal["gloo", "nccl"]
    device: torch.device
    """Where buckets lie."""
    bucket_bytes: int
    timeout_seconds: float
    max_restarts: int
    verify_refit: bool
    abort_after_seconds: float | None = None
    """When to cut off answers that are not finished; None: never."""


class VllmServers:
    """Engine (`protocol.Engine`) that samples on vLLM servers, started by `megatron-prime serve` or by others.

    A server that is lost does not stop the run while another one is left: its answers are sampled there (seeds belong
    to answers), and it is asked again at every refit, so that one which was started anew joins with new weights.
    """

    def __init__(self, setup: ServersSetup) -> None:
        self.weight_version = -1
        self._setup = setup
        self._plan: SharedPlan | None = None
        self._members: tuple[str, ...] = ()
        """Servers in the sender's group, which hold the latest weights if any are loaded."""
        self._sender: BucketSender | None = None
        self._group: Group | None = None
        self._has_met = False
        self._version = -1
        """Of the weights that the members hold; -1: not known."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """See `protocol.Engine.generate`."""
        setup = self._setup
        if self.weight_version < 0:
            raise RolloutError("the rollout engine cannot generate: it has no weights; call load_weights first")
        check_prompts(
            prompts, sampling.max_response_tokens, max_length=setup.max_model_len, vocab_size=setup.vocab_size
        )
        groups: list[list[Response]] = []
        problem = None
        if world.is_main():
            try:
                groups = asyncio.run(self._sample(prompts, sampling, on_answer))
            except RolloutError as error:
                problem = str(error)
        raise_for([world.broadcast(problem)])
        return world.broadcast(groups)

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """See `protocol.Engine.load_weights`; a failed load leaves no server that could be asked for answers."""
        self.weight_version = -1
        raise_together(not_finite(find_non_finite(weights.slices())), f"weights of version {version}: ")
        if self._plan is None:
            self._plan = whole_tensors(lay_out(weights.tensors()))
        failures: Counter[str] = Counter()
        for attempt in range(self._setup.max_restarts + 1):
            excluded = {url for url, count in failures.items() if count > 1}
            raise_for([world.broadcast(_problem_of(self._connect(excluded)) if world.is_main() else None)])
            checksum = None
            if world.is_main():
                checksum = asyncio.run(self._load(weights, version, failures))
            elif self._setup.holds_copy:
                for _ in weights:
                    pass
            if (checksum := world.broadcast(checksum)) is not None:
                self.weight_version = version
                return checksum
            logger.warning("weights of version %d: attempt %d failed", version, attempt + 1)
        raise RolloutError(f"weights of version {version} could not be loaded into {', '.join(self._setup.urls)}")

    def sleep(self) -> None:
        """Servers keep their memory; nothing to do."""

    def wake(self) -> None:
        """Undoes `sleep`."""

    def close(self) -> None:
        """Leaves the servers alone: they were not started here."""
        self.weight_version = -1
        self._sender = self._group = None

    async def _connect(self, excluded: set[str]) -> None:
        """Has a group of all servers that are there; a new one if it changed or one of them was started anew."""
        setup = self._setup
        async with self._client() as client:
            servers = [VllmServer(url, client, setup.timeout_seconds) for url in setup.urls if url not in excluded]
            # The first time all must come: a run should not start on half of its servers.
            patience = 0.0 if self._has_met else setup.timeout_seconds
            versions = await _wait_for(servers, patience)
            there = [server for server in servers if versions[server.url] is not None]
            absent = [server.url for server in servers if server not in there]
            if not there or (patience and absent):
                raise RolloutError(
                    f"rollout.vllm.servers: {', '.join(absent) or 'none that is left'}: no answer to /health and "
                    "/weight_info; start each with `megatron-prime serve CONFIG --port PORT`"
                )
            if absent:
                logger.warning("vLLM servers that do not answer: %s", ", ".join(absent))
            urls = tuple(server.url for server in there)
            held = {versions[url] for url in urls}
            if self._sender is None or urls != self._members or held != {str(self._version)}:
                await self._meet(there)

    async def _meet(self, servers: Sequence[VllmServer]) -> None:
        """Makes a new group of the sender and every worker of these servers."""
        assert self._plan is not None
        setup = self._setup
        self._members, self._sender, self._group, self._version = (), None, None, -1
        if (shortest := min(await asyncio.gather(*(s.max_model_len() for s in servers)))) < setup.max_model_len:
            raise RolloutError(
                f"rollout.vllm.servers: a server takes {shortest} tokens at most, rollout.vllm.max_model_len is "
                f"{setup.max_model_len}; start the servers with this run's configuration"
            )
        num_workers = await asyncio.gather(*(server.num_workers() for server in servers))
        size, port = 1 + sum(num_workers), _free_port()
        meeting = {
            "backend": setup.transfer,
            "port": port,
            "size": size,
            "entries": [[entry.name, list(entry.shape), entry.dtype, entry.offset] for entry in self._plan.entries],
            "bucket_bytes": setup.bucket_bytes,
            "compare_digests": setup.verify_refit,
            "timeout_seconds": min(_MEETING_SECONDS, setup.timeout_seconds),
        }
        ranks = [1 + sum(num_workers[:number]) for number in range(len(servers))]
        place = ("0.0.0.0", port, 0, size, meeting["timeout_seconds"])
        own = asyncio.to_thread(Group, setup.transfer, *place, setup.device)
        joined = [
            server.meet(meeting | {"address": _address_towards(server.url), "first_rank": rank})
            for server, rank in zip(servers, ranks, strict=True)
        ]
        try:
            group, *_ = await asyncio.gather(own, *joined)
        except (ServerLost, RuntimeError) as error:
            raise RolloutError(f"the vLLM servers and the trainer did not come together: {error}") from error
        assert group is not None
        buckets = [torch.empty(setup.bucket_bytes, dtype=torch.uint8, device=setup.device) for _ in range(2)]
        self._group = group
        self._sender = BucketSender(self._plan, group, buckets, with_digests=setup.verify_refit)
        self._members, self._has_met = tuple(server.url for server in servers), True

    async def _load(self, weights: ExportedWeights, version: int, failures: Counter[str]) -> str | None:
        """Sends one set of weights; the checksum of all, or None and one more failure of each that failed."""
        self._version = -1
        async with self._client() as client:
            servers = [VllmServer(url, client, self._setup.timeout_seconds) for url in self._members]
            failed = await _each(servers, VllmServer.start_load)
            # Whoever was ready waits for weights; they are sent to all or to none.
            checksum = None
            if failed:
                _drain(weights)
            else:
                sending = asyncio.create_task(asyncio.to_thread(self._send, weights))
                failed = await _each(servers, self._receive)
                checksum = await sending
            if not failed and checksum is not None:
                failed = await _each(servers, lambda server: server.finish_load(version))
        for url, error in failed.items():
            logger.warning("vLLM server %s was lost in a refit: %s", url, error)
        # One that failed only because another one was lost gets a second chance; the lost one will not answer.
        failures.update(failed.keys())
        if failed or checksum is None:
            # The others are in the middle of something; they meet anew.
            self._sender = self._group = None
            return None
        self._version = version
        return checksum

    async def _receive(self, server: VllmServer) -> None:
        """Has a server take what is sent; if it does not, nobody shall wait for it."""
        assert self._group is not None
        try:
            await server.load()
        except ServerLost:
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

    async def _sample(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None
    ) -> list[list[Response]]:
        setup = self._setup
        waiting = {
            (index, answer): make_request(f"{index}/{answer}", prompt, answer, sampling, setup.end_token_ids)
            for index, prompt in enumerate(prompts)
            for answer in range(sampling.num_responses)
        }
        done: dict[tuple[int, int], Response] = {}

        def take(key: tuple[int, int], finished: Finished) -> None:
            del waiting[key]
            done[key] = to_response(finished, setup.decode)
            if on_answer is not None:
                on_answer(*key, done[key])

        async with self._client() as client:
            left = [VllmServer(url, client, setup.timeout_seconds) for url in self._members]
            while waiting and left:
                shares: list[dict[tuple[int, int], EngineRequest]] = [{} for _ in left]
                for key, request in waiting.items():
                    # A prompt's answers share a server and, there, what was computed for the prompt.
                    shares[key[0] % len(left)][key] = request
                lost = await asyncio.gather(
                    *(self._sample_on(server, share, take) for server, share in zip(left, shares, strict=True))
                )
                for error in filter(None, lost):
                    logger.warning("a vLLM server was lost: %s", error)
                left = [server for server, error in zip(left, lost, strict=True) if error is None]
        if waiting:
            raise RolloutError(f"all vLLM servers are lost ({', '.join(setup.urls)}); the reasons are above")
        return [[done[index, answer] for answer in range(sampling.num_responses)] for index in range(len(prompts))]

    async def _sample_on(
        self,
        server: VllmServer,
        requests: dict[tuple[int, int], EngineRequest],
        take: Callable[[tuple[int, int], Finished], None],
    ) -> ServerLost | None:
        """Samples on one server until all is done or it is lost; answers that came until then count."""
        places = asyncio.Semaphore(2 * self._setup.max_num_seqs)
        start = last = time.monotonic()
        limit = self._setup.abort_after_seconds

        async def one(key: tuple[int, int], request: EngineRequest) -> None:
            nonlocal last
            async with places:
                finished = await server.sample(request)
                if not finished.token_ids:
                    # Cut off before it began; no answer is empty.
                    finished = await server.sample(replace(request, max_tokens=1))
            if set(finished.weight_versions) != {self._version}:
                raise ServerLost(f"{server.url}: sampled with weights {finished.weight_versions}, not {self._version}")
            last = time.monotonic()
            take(key, finished)

        tasks = [asyncio.create_task(one(key, request)) for key, request in requests.items()]
        running: set[asyncio.Task[None]] = set(tasks)
        try:
            while running:
                ended, running = await asyncio.wait(running, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                for task in ended:
                    task.result()
                if running and limit is not None and time.monotonic() - start > limit:
                    await server.abort()
                if running and time.monotonic() - last > self._setup.timeout_seconds:
                    return ServerLost(f"{server.url}: no answer for {self._setup.timeout_seconds:g} seconds")
        except ServerLost as error:
            return error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None

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


async def _each(
    servers: Sequence[VllmServer], action: Callable[[VllmServer], Awaitable[Any]]
) -> dict[str, BaseException]:
    """Does something with all servers at once; what went wrong, by server."""
    results = await asyncio.gather(*(action(server) for server in servers), return_exceptions=True)
    failed: dict[str, BaseException] = {}
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, ServerLost):
            failed[server.url] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


def _problem_of(action: Coroutine[Any, Any, None]) -> str | None:
    try:
        asyncio.run(action)
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
