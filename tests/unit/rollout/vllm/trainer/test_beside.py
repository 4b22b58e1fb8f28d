"""An engine beside the trainer that is lost and replaced: no answer is lost, doubled or of other weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench.common.engine_setup import engine_setup
from scripted_engines import Script, ScriptedParent, engine
from tiny_engines import make_prompt
from tiny_models import save_tiny_model

from megatron_prime.batch import SamplingParams
from megatron_prime.config.schema import VllmSection
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
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
def parents() -> Iterator[list[ScriptedParent]]:
    made: list[ScriptedParent] = []
    yield made
    for parent in made:
        parent.close()


def make(parents: list[ScriptedParent], folder: Path, *scripts: Script) -> VllmBeside:
    parents.append(ScriptedParent(*scripts))
    section = VllmSection(max_restarts=1, timeout_seconds=20.0)
    return VllmBeside(engine_setup(folder, section), parents[-1])  # pyright: ignore[reportArgumentType]


def export(folder: Path) -> FolderExport:
    return FolderExport(HfFolder(folder), read_architecture(folder), torch.float32)


def test_a_lost_engine_is_replaced_by_one_with_the_current_weights(parents, folder: Path, caplog) -> None:
    beside = make(parents, folder, engine(fails_after=2), engine())
    beside.load_weights(export(folder), version=4)
    groups = beside.generate(PROMPTS, SAMPLING)
    assert [[found.token_ids for found in group] for group in groups] == ANSWERS
    assert {found.weight_version for group in groups for found in group} == {4}
    assert "vLLM engine 0 was lost: the engine process has ended" in caplog.text
    assert beside.process_id() == parents[0].processes[1].pid
    beside.close()
    assert [process.wait(20) for process in parents[0].processes] == [-9, -9]


def test_an_engine_that_is_lost_again_and_again_ends_the_run(parents, folder: Path) -> None:
    beside = make(parents, folder, *[engine(fails_after=0)] * 2)
    beside.load_weights(export(folder), version=0)
    with pytest.raises(RolloutError, match="vLLM engine 0 was lost 2 times in a row; the last time: the engine"):
        beside.generate(PROMPTS, SAMPLING)
    beside.close()


def test_losses_are_counted_anew_with_every_call(parents, folder: Path) -> None:
    beside = make(parents, folder, engine(fails_after=2), engine(fails_after=6), engine())
    beside.load_weights(export(folder), version=0)
    for _ in range(2):
        groups = beside.generate(PROMPTS, SAMPLING)
        assert [[found.token_ids for found in group] for group in groups] == ANSWERS
    beside.close()


def test_weights_that_an_engine_refuses_are_loaded_by_its_successor(parents, folder: Path, caplog) -> None:
    beside = make(parents, folder, engine(refuses_version=1), engine())
    first = beside.load_weights(export(folder), version=0)
    assert beside.load_weights(export(folder), version=1) == first
    assert "vLLM engine 0 was lost: the engine's weights differ" in caplog.text
    assert beside.generate(PROMPTS[:1], SAMPLING)[0][0].weight_version == 1
    beside.close()


def test_weights_that_every_engine_refuses_leave_none(parents, folder: Path) -> None:
    beside = make(parents, folder, *[engine(refuses_version=1)] * 2)
    beside.load_weights(export(folder), version=0)
    with pytest.raises(RolloutError, match="lost 2 times in a row; the last time: the engine's weights differ"):
        beside.load_weights(export(folder), version=1)
    assert beside.weight_version == -1
    beside.close()
