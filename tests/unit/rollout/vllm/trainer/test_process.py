"""An engine process as the trainer sees it: what it says, its silence, its end, and that nothing of it is left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from scripted_engines import Script, ScriptedParent, answer, engine

from megatron_prime import heartbeat
from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.trainer.process import EngineLost, EngineProcess, _end_group, engine_environment
from megatron_prime.rollout.vllm.wire.messages import (
    EngineOptions,
    EngineRequest,
    Failed,
    Generate,
    Progress,
    Ready,
    Started,
)

REQUESTS = [
    EngineRequest(
        request_id=f"{n}/0",
        prompt_token_ids=(n, n + 1),
        seed=n,
        temperature=1.0,
        top_p=1.0,
        max_tokens=4,
        stop_token_ids=(),
    )
    for n in range(3)
]


@pytest.fixture
def parents() -> Iterator[list[ScriptedParent]]:
    made: list[ScriptedParent] = []
    yield made
    for parent in made:
        parent.close()


def start(parents: list[ScriptedParent], script: Script, timeout_seconds: float = 20.0) -> EngineProcess:
    parents.append(ScriptedParent(script))
    section = VllmSection(timeout_seconds=timeout_seconds)
    options = EngineOptions(
        folder="model", dtype="float32", section=section, max_model_len=32, transfer="shared_memory"
    )
    return EngineProcess(parents[-1], options)  # pyright: ignore[reportArgumentType]


def test_answers_come_as_they_finish_and_the_process_ends_when_it_is_closed(parents) -> None:
    process = start(parents, engine())
    found = list(process.generate(REQUESTS))
    assert found == [answer(request, -1) for request in REQUESTS]
    assert not process.has_reply()
    process.close()
    assert parents[0].processes[0].wait(20) == -9


def test_an_engine_that_ends_midway_is_lost_after_the_answers_that_came(parents) -> None:
    process = start(parents, engine(fails_after=2))
    answers = process.generate(REQUESTS)
    assert [next(answers).request_id for _ in range(2)] == ["0/0", "1/0"]
    with pytest.raises(EngineLost, match="the engine process has ended"):
        next(answers)
    assert process.has_reply()
    process.close()
    with pytest.raises(EngineLost):
        next(process.generate(REQUESTS))


def test_what_an_engine_says_before_it_ends_is_the_reason(parents) -> None:
    def fail(connection: Connection, process_id: int) -> None:
        connection.send(Started(process_id=process_id))
        connection.send(Failed(text="out of memory"))
        connection.recv()

    with pytest.raises(EngineLost, match="out of memory"):
        start(parents, fail)
    assert parents[0].processes[0].wait(20) == -9


def test_silence_has_an_end(parents) -> None:
    def say_nothing(connection: Connection, process_id: int) -> None:
        connection.send(Started(process_id=process_id))
        connection.send(Ready())
        connection.recv()
        connection.recv()

    process = start(parents, say_nothing, timeout_seconds=0.4)
    with pytest.raises(EngineLost, match="said nothing for 0 seconds"):
        next(process.generate(REQUESTS))
    assert parents[0].processes[0].wait(20) == -9


def test_a_long_answer_is_no_silence_while_its_tokens_come(parents) -> None:
    def take_long(connection: Connection, process_id: int) -> None:
        connection.send(Started(process_id=process_id))
        connection.send(Ready())
        asked = connection.recv()
        assert isinstance(asked, Generate)
        # For longer than the time limit.
        for _ in range(8):
            time.sleep(0.1)
            connection.send(Progress())
        for request in asked.requests:
            connection.send(answer(request, 0))

    process = start(parents, take_long, timeout_seconds=0.6)
    assert len(list(process.generate(REQUESTS))) == 3
    process.close()


def test_whoever_waits_for_an_engine_gives_heartbeats(parents, monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)

    def take_long(connection: Connection, process_id: int) -> None:
        connection.send(Started(process_id=process_id))
        time.sleep(0.5)
        connection.send(Ready())
        connection.recv()

    heard: list[float] = []
    with heartbeat.listening(lambda: heard.append(time.monotonic())):
        start(parents, take_long).close()
    assert len(heard) >= 3


def test_an_engines_workers_end_with_it() -> None:
    code = """if True:
        import subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print(worker.pid, flush=True)
        time.sleep(1000)
    """
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, text=True)
    assert leader.stdout is not None
    worker = int(leader.stdout.readline())
    _end_group(leader.pid)
    assert leader.wait(20) == -9
    state = Path(f"/proc/{worker}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_engines_on_cpus_and_gpus_find_different_environments() -> None:
    gpu, cpu = engine_environment(on_gpu=True), engine_environment(on_gpu=False)
    assert gpu.items() < cpu.items() and "VLLM_CPU_OMP_THREADS_BIND" in cpu
    gpu["HF_HUB_OFFLINE"] = "0"
    assert engine_environment(on_gpu=True)["HF_HUB_OFFLINE"] == "1"
