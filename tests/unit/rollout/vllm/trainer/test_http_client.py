"""One server over real HTTP: what it is asked, how its answers are read, and what counts as lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from scripted_servers import ScriptedServer, serving

from megatron_prime import heartbeat
from megatron_prime.rollout.vllm.trainer.http_client import ServerLost, VllmServer, each, say_progress
from megatron_prime.rollout.vllm.wire.messages import EngineRequest

REQUEST = EngineRequest(
    request_id="3/1",
    prompt_token_ids=(7, 8, 9),
    seed=11,
    temperature=0.7,
    top_p=0.9,
    max_tokens=2,
    stop_token_ids=(1, 2),
)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer(max_model_len=48)
    with serving(scripted):
        yield scripted


def ask(url: str, action: Callable[[VllmServer], Awaitable[Any]], timeout_seconds: float = 20.0) -> Any:
    async def run() -> Any:
        async with aiohttp.ClientSession() as client:
            return await action(VllmServer(url, client, timeout_seconds))

    return asyncio.run(run())


def test_an_answer_is_what_was_sampled_and_with_which_weights(server: ScriptedServer) -> None:
    server.version = "5"
    finished = ask(server.url, lambda asked: asked.sample(REQUEST))
    assert (finished.request_id, finished.token_ids, finished.logprobs) == ("3/1", (9, 8), (-0.5, -0.5))
    assert (finished.finish_reason, finished.weight_versions) == ("length", (5,))
    (body,) = server.calls("/inference/v1/generate")
    assert body["token_ids"] == [7, 8, 9]
    parameters = body["sampling_params"]
    assert (parameters["temperature"], parameters["top_p"], parameters["max_tokens"]) == (0.7, 0.9, 2)
    assert (parameters["seed"], parameters["stop_token_ids"], parameters["ignore_eos"]) == (11, [1, 2], True)


def test_weights_without_a_number_are_of_no_version(server: ScriptedServer) -> None:
    assert ask(server.url, lambda asked: asked.sample(REQUEST)).weight_versions == (-1,)


def test_what_a_server_says_of_itself(server: ScriptedServer) -> None:
    assert ask(server.url, VllmServer.version) == "default"
    assert ask(server.url, VllmServer.num_workers) == 1
    assert ask(server.url, VllmServer.max_model_len) == 48
    # Of its counters, those of tokens.
    assert ask(server.url, VllmServer.num_tokens) == 3.0


def test_a_load_ends_with_old_answers_forgotten_and_sampling_resumed(server: ScriptedServer) -> None:
    async def load(asked: VllmServer) -> None:
        await asked.start_load()
        await asked.finish_load(6)

    ask(server.url, load)
    assert [path for path, _ in server.asked] == [
        "/pause",
        "/start_weight_update",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/resume",
    ]
    assert server.version == "6"


def test_an_error_is_passed_on_with_its_text_and_its_place(server: ScriptedServer) -> None:
    server.broken = {"/get_world_size", "/metrics", "/weight_info"}
    with pytest.raises(ServerLost, match=r"http://127\.0\.0\.1:\d+/get_world_size: HTTP 500: out of order"):
        ask(server.url, VllmServer.num_workers)
    assert ask(server.url, VllmServer.num_tokens) is None
    assert ask(server.url, VllmServer.version) is None


def test_a_server_that_is_not_there_or_silent_is_lost() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerLost, match="/get_world_size: Client"):
            ask(url, VllmServer.num_workers)
        silent.listen()
        with pytest.raises(ServerLost, match=r"/get_world_size: no answer within 0\.2 seconds"):
            ask(url, VllmServer.num_workers, timeout_seconds=0.2)


def test_all_are_asked_and_who_failed_is_told_from_who_did_not(server: ScriptedServer) -> None:
    other = ScriptedServer(max_model_len=32)
    with serving(other):
        other.broken = {"/get_world_size"}

        async def ask_both() -> tuple[dict[str, str], dict[str, int]]:
            async with aiohttp.ClientSession() as client:
                servers = [VllmServer(url, client, 20.0) for url in (server.url, other.url)]
                return await each(servers, VllmServer.num_workers)

        failed, done = asyncio.run(ask_both())
    assert done == {server.url: 1} and list(failed) == [other.url]


def test_an_error_of_ones_own_is_nobody_elses(server: ScriptedServer) -> None:
    async def wrong(asked: VllmServer) -> None:
        raise ZeroDivisionError

    async def ask_one() -> None:
        async with aiohttp.ClientSession() as client:
            await each([VllmServer(server.url, client, 20.0)], wrong)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask_one())


def test_heartbeats_are_given_while_servers_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    heard: list[None] = []

    async def work() -> str:
        await asyncio.sleep(0.3)
        return "done"

    with heartbeat.listening(lambda: heard.append(None)):
        assert asyncio.run(say_progress(work())) == "done"
    assert len(heard) >= 3
