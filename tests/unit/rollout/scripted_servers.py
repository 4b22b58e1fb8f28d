"""A vLLM server's HTTP endpoints without vLLM: real HTTP on this host, real buckets over gloo, answers by rule."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from aiohttp import web

from megatron_prime.rollout.vllm.wire.broadcast import Group
from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver
from megatron_prime.rollout.vllm.wire.shared_memory import TensorEntry, whole_tensors

CPU = torch.device("cpu")


class ScriptedServer:
    """Takes weights and answers with the prompt backwards; `broken` are paths that it answers with an error."""

    def __init__(self, *, max_model_len: int = 64) -> None:
        self.max_model_len = max_model_len
        self.broken: set[str] = set()
        self.version = "default"
        self.held: dict[str, torch.Tensor] = {}
        self.asked: list[tuple[str, Any]] = []
        """Path and body of every call, in order."""
        self.url = ""
        self._group: Group | None = None
        self._receiver: BucketReceiver | None = None

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body))
        if request.path in self.broken:
            return web.Response(status=500, text="out of order")
        match request.path:
            case "/health":
                return web.Response()
            case "/weight_info":
                return web.json_response({"weight_version": self.version})
            case "/metrics":
                return web.Response(text='# HELP x\nvllm:prompt_tokens_total{a="b"} 3.0\nvllm:other{} 9\n')
            case "/get_world_size":
                return web.json_response({"world_size": 1})
            case "/v1/models":
                return web.json_response({"data": [{"max_model_len": self.max_model_len}]})
            case "/init_weight_transfer_engine":
                await asyncio.to_thread(self._meet, **body["init_info"])
            case "/update_weights":
                await asyncio.to_thread(self._receive)
            case "/finish_weight_update":
                self.version = body["weight_version"]
            case "/inference/v1/generate":
                return web.json_response({"choices": [self._choice(body)]})
        return web.json_response({})

    def _meet(self, **meeting: Any) -> None:
        entries = tuple(TensorEntry(name, tuple(shape), *rest) for name, shape, *rest in meeting["entries"])
        address, size = (meeting["address"], meeting["port"]), meeting["size"]
        self._group = Group(meeting["backend"], *address, meeting["first_rank"], size, meeting["timeout_seconds"], CPU)
        self._receiver = BucketReceiver(
            whole_tensors(entries), self._group, meeting["bucket_bytes"], CPU, keeps_all=True
        )

    def _receive(self) -> None:
        assert self._receiver is not None
        self.held = {name: tensor.clone() for batch in self._receiver for name, tensor in batch}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        token_ids = body["token_ids"][::-1][: body["sampling_params"]["max_tokens"]]
        return {
            "token_ids": token_ids,
            "finish_reason": "length",
            "logprobs": {"content": [{"logprob": -0.5}] * len(token_ids)},
            "weight_versions": [{"version": self.version}],
        }

    def calls(self, path: str) -> list[Any]:
        """Bodies of the calls of a path."""
        return [body for called, body in self.asked if called == path]


@contextmanager
def serving(*servers: ScriptedServer) -> Iterator[None]:
    """Runs servers on ports of their own, in a thread."""
    loop = asyncio.new_event_loop()
    runners = []

    async def start() -> None:
        for server in servers:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", server._handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            runners.append(runner)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            server.url = f"http://{host}:{port}"

    async def stop() -> None:
        for runner in runners:
            await runner.cleanup()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
