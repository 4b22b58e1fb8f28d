"""Servers as a rollout engine, with scripted ones: who must be there, what reaches them, and who is left out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench.common.engine_setup import engine_setup
from scripted_servers import ScriptedServer, serving
from tiny_engines import make_prompt
from tiny_models import save_tiny_model

from megatron_prime.batch import SamplingParams
from megatron_prime.config.schema import VllmSection
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.trainer.remote import VllmServers
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder

SAMPLING = SamplingParams(num_responses=2, temperature=1.0, top_p=1.0, max_response_tokens=4, seed=5)
PROMPTS = [make_prompt(f"p{n}", [n, n + 1]) for n in range(3)]
ANSWERS = [[(n + 1, n)] * 2 for n in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    made = [ScriptedServer(), ScriptedServer()]
    with serving(*made):
        yield made


def make(folder: Path, urls: list[str], **section: object) -> VllmServers:
    changes: dict[str, object] = {"max_model_len": 48, "timeout_seconds": 20.0, "max_restarts": 1, "bucket_mib": 1}
    settings = VllmSection(servers=urls, **(changes | section))  # pyright: ignore[reportArgumentType]
    return VllmServers(engine_setup(folder, settings))


def export(folder: Path) -> FolderExport:
    return FolderExport(HfFolder(folder), read_architecture(folder), torch.float32)


def holds_all(server: ScriptedServer, folder: Path) -> bool:
    expected = dict(export(folder))
    return list(server.held) == list(expected) and all(torch.equal(server.held[n], t) for n, t in expected.items())


def test_every_server_gets_every_weight_and_a_share_of_the_prompts(servers, folder: Path) -> None:
    engine = make(folder, [server.url + "/" for server in servers])
    checksums = [engine.load_weights(export(folder), version) for version in (3, 4)]
    assert checksums[0] == checksums[1]
    assert all(holds_all(server, folder) and server.version == "4" for server in servers)
    # They meet once and stay together.
    assert [len(server.calls("/init_weight_transfer_engine")) for server in servers] == [1, 1]
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [[found.token_ids for found in group] for group in groups] == ANSWERS
    assert {found.weight_version for group in groups for found in group} == {4}
    assert [len(server.calls("/inference/v1/generate")) for server in servers] == [4, 2]
    engine.close()


def test_a_run_does_not_start_without_all_of_its_servers(servers, folder: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        absent = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        engine = make(folder, [servers[0].url, absent], timeout_seconds=0.2)
        with pytest.raises(RolloutError, match=rf"rollout\.vllm\.servers: {absent}: no answer to /health"):
            engine.load_weights(export(folder), 0)
    assert engine.weight_version == -1 and servers[0].held == {}


def test_a_server_for_shorter_answers_is_refused_with_the_reason(servers, folder: Path) -> None:
    servers[1].max_model_len = 47
    engine = make(folder, [server.url for server in servers])
    with pytest.raises(
        RolloutError, match=f"{servers[1].url} takes 47 tokens at most, rollout.vllm.max_model_len is 48"
    ):
        engine.load_weights(export(folder), 0)


def test_a_server_that_is_lost_while_it_samples_is_no_loss_of_answers(servers, folder: Path, caplog) -> None:
    engine = make(folder, [server.url for server in servers])
    engine.load_weights(export(folder), 0)
    servers[1].broken = {"/inference/v1/generate"}
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [[found.token_ids for found in group] for group in groups] == ANSWERS
    assert f"a vLLM server was lost: {servers[1].url}/inference/v1/generate: HTTP 500" in caplog.text
    servers[0].broken = {"/inference/v1/generate"}
    with pytest.raises(RolloutError, match="all vLLM servers are lost"):
        engine.generate(PROMPTS, SAMPLING)


def test_answers_of_other_weights_do_not_count(servers, folder: Path, caplog) -> None:
    engine = make(folder, [server.url for server in servers])
    engine.load_weights(export(folder), 2)
    servers[1].version = "1"  # it was started anew, or somebody else loaded weights into it
    groups = engine.generate(PROMPTS, SAMPLING)
    assert {found.weight_version for group in groups for found in group} == {2}
    assert "sampled with weights (1,), not 2" in caplog.text


def test_a_server_that_takes_no_weights_is_left_out_after_its_last_chance(servers, folder: Path, caplog) -> None:
    engine = make(folder, [server.url for server in servers])
    engine.load_weights(export(folder), 0)
    servers[1].broken = {"/finish_weight_update"}
    engine.load_weights(export(folder), 1)
    assert servers[0].version == "1" and servers[1].version == "0"
    assert f"{servers[1].url}/finish_weight_update: HTTP 500" in caplog.text
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [[found.token_ids for found in group] for group in groups] == ANSWERS
    assert servers[1].calls("/inference/v1/generate") == []
