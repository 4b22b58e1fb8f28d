"""One vLLM server over HTTP: what the trainer asks it, and what it means when it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import aiohttp

from megatron_prime import heartbeat
from megatron_prime.rollout.vllm.wire.messages import EngineRequest, Finished

Result = TypeVar("Result")

_HEALTH_SECONDS = 5.0
_TOKEN_COUNTERS = ("vllm:prompt_tokens_total{", "vllm:generation_tokens_total{")


class ServerLost(Exception):
    """A server is not there, or not able to do what it was asked."""


async def say_progress(action: Awaitable[Result]) -> Result:
    """Awaits servers, which all have a time limit, with heartbeats meanwhile."""

    async def say() -> None:
        while True:
            heartbeat.beat()
            await asyncio.sleep(heartbeat.BEAT_SECONDS)

    saying = asyncio.create_task(say())
    try:
        return await action
    finally:
        saying.cancel()


class VllmServer:
    """A vLLM server with its development and scale-out endpoints (`serve_command.server_command`).

    Args:
        url: as in ``http://host:8000``.
        client: of the running event loop.
        timeout_seconds: for everything but sampling.
    """

    def __init__(self, url: str, client: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self.url = url
        self._client = client
        self._timeout_seconds = timeout_seconds

    async def version(self) -> str | None:
        """Of the weights that it holds; None: it does not answer (yet)."""
        try:
            await self._call("GET", "/health", timeout_seconds=_HEALTH_SECONDS)
            return (await self._call("GET", "/weight_info", timeout_seconds=_HEALTH_SECONDS))["weight_version"]
        except ServerLost:
            return None

    async def num_tokens(self) -> float | None:
        """Read and sampled since it was started, for anyone; None: it does not say (now)."""
        try:
            text = await self._call("GET", "/metrics", timeout_seconds=_HEALTH_SECONDS)
        except ServerLost:
            return None
        counters = [line.split()[-1] for line in str(text).splitlines() if line.startswith(_TOKEN_COUNTERS)]
        return sum(map(float, counters)) if counters else None

    async def num_workers(self) -> int:
        """Processes that hold its weights."""
        return int((await self._call("GET", "/get_world_size"))["world_size"])

    async def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return int((await self._call("GET", "/v1/models"))["data"][0]["max_model_len"])

    async def meet(self, meeting: dict[str, Any]) -> None:
        """Has its workers join the group that weights are sent in."""
        await self._call("POST", "/collective_rpc", {"method": "prime_leave_update"})
        await self._call("POST", "/shutdown_weight_transfer_engine")
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": meeting})

    async def start_load(self) -> None:
        """Stops sampling and makes ready for weights."""
        await self._call("POST", "/pause?mode=abort&clear_cache=true")
        await self._call("POST", "/start_weight_update")

    async def load(self) -> None:
        """Takes the weights that are sent meanwhile."""
        await self._call("POST", "/update_weights", {"update_info": {}})

    async def finish_load(self, version: int) -> None:
        """Compares what it holds with what was sent, forgets what it computed before, and may sample again."""
        await self._call("POST", "/finish_weight_update", {"weight_version": str(version)})
        await self._call("POST", "/reset_prefix_cache")
        await self._call("POST", "/collective_rpc", {"method": "prime_zero_kv_cache"})
        await self._call("POST", "/resume")

    async def sample(self, request: EngineRequest) -> Finished:
        """One answer; waits for it without end."""
        parameters = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "logprobs": 0,
            "detokenize": False,
            # The end tokens are among the stop tokens; which ones they are is the trainer's to say.
            "ignore_eos": True,
            "stop_token_ids": list(request.stop_token_ids),
        }
        body = {"token_ids": list(request.prompt_token_ids), "sampling_params": parameters}
        (choice,) = (await self._call("POST", "/inference/v1/generate", body, timeout_seconds=None))["choices"]
        reason = choice["finish_reason"]
        return Finished(
            request_id=request.request_id,
            token_ids=tuple(choice["token_ids"] or ()),
            logprobs=tuple(entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or ()),
            finish_reason=reason if reason in ("stop", "length") else "abort",
            # A server that was started anew holds weights of no number.
            weight_versions=tuple(
                int(span["version"]) if span["version"].isdigit() else -1 for span in choice["weight_versions"] or ()
            ),
        )

    async def abort(self) -> None:
        """Cuts off everything that it samples."""
        await self._call("POST", "/abort_requests", {})

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_seconds: float | None = -1.0
    ) -> Any:
        total = self._timeout_seconds if timeout_seconds == -1.0 else timeout_seconds
        try:
            async with self._client.request(
                method, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=total)
            ) as response:
                if response.status != 200:
                    text = (await response.text())[:2000]
                    raise ServerLost(f"{self.url}{path}: HTTP {response.status}: {text}")
                return await (response.json() if response.content_type == "application/json" else response.text())
        except TimeoutError as error:
            raise ServerLost(f"{self.url}{path}: no answer within {total:g} seconds") from error
        except aiohttp.ClientError as error:
            raise ServerLost(f"{self.url}{path}: {type(error).__name__}: {error}") from error


async def each(
    servers: Sequence[VllmServer], action: Callable[[VllmServer], Awaitable[Result]]
) -> tuple[dict[str, str], dict[str, Result]]:
    """Does something with all servers at once; what went wrong and what came of it, by server."""
    results = await asyncio.gather(*(action(server) for server in servers), return_exceptions=True)
    failed: dict[str, str] = {}
    done: dict[str, Result] = {}
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, ServerLost):
            failed[server.url] = str(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            done[server.url] = result
    return failed, done
