"""A trained model as chunks of stored tensors, on one rank: they cover everything once, and bring all of it back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_rows import ScaledLoss, make_rows
from tiny_models import role_setup, save_tiny_model

from megatron_prime.checkpoint.torch_dist import file_name, write_chunks, write_description
from megatron_prime.config.schema import OptimizerSection, ParallelSection
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.checkpoint.state import (
    _Piece,
    _rectangles,
    load_training_state,
    load_weights,
    model_chunks,
    optimizer_chunks,
    step_count,
)
from megatron_prime.mcore.cpu import megatron_platform
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import TrainableRole
from megatron_prime.weights.hf_folder import HfFolder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in ("qwen2_untied", "qwen3")}


@contextmanager
def roles(folder: Path, count: int, *, dtype: str, distributed: bool) -> Iterator[list[TrainableRole]]:
    """Some roles, the first one with a folder's weights, the others random."""
    parallel = ParallelSection(use_distributed_optimizer=distributed)
    optimizer = OptimizerSection(lr=1e-3, lr_decay_style="linear", lr_warmup_steps=1)
    with parallel_layout(parallel, seed=1) as layout, megatron_platform():
        made = [
            TrainableRole(role_setup(folder, dtype, parallel, layout), optimizer, num_optimizer_steps=9)
            for _ in range(count)
        ]
        made[0].load_hf(HfFolder(folder))
        yield made


def train(role: TrainableRole) -> float:
    return role.optimizer_step(make_rows(), range(7), ScaledLoss(-1 / 20)).metrics["loss"]


def save(role: TrainableRole, place: Path) -> Path:
    place.mkdir()
    chunks = model_chunks(role.chunks) + optimizer_chunks(role.chunks, role.optimizer)
    written = write_chunks(place / file_name(0), [chunk._replace(tensor=chunk.tensor.clone()) for chunk in chunks])
    common = {"optimizer": {"step": step_count(role.optimizer)}, "scheduler": role.scheduler.state_dict()}
    write_description(place, written.chunks, common)
    return place


@pytest.mark.parametrize(("dtype", "distributed"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_a_fresh_model_goes_on_bit_by_bit(folders, tmp_path: Path, dtype: str, distributed: bool) -> None:
    with roles(folders["qwen3"], 2, dtype=dtype, distributed=distributed) as (trained, fresh):
        for _ in range(3):
            train(trained)
        place = save(trained, tmp_path / "saved")
        load_training_state(fresh.chunks, fresh.optimizer, fresh.scheduler, place)
        assert step_count(fresh.optimizer) == 3
        assert [train(fresh) for _ in range(2)] == [train(trained) for _ in range(2)]
        weights = trained.local_weights()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in fresh.local_weights().items())


def test_an_optimizer_of_the_other_kind_reads_the_same_states(folders, tmp_path: Path) -> None:
    with roles(folders["qwen3"], 1, dtype="float32", distributed=False) as (trained,):
        train(trained)
        place = save(trained, tmp_path / "saved")
        loss = train(trained)
        after = {name: tensor.clone() for name, tensor in trained.local_weights().items()}
    with roles(folders["qwen3"], 1, dtype="float32", distributed=True) as (fresh,):
        load_training_state(fresh.chunks, fresh.optimizer, fresh.scheduler, place)
        assert train(fresh) == loss
        # Its gradient norm is summed in another order.
        for name, tensor in fresh.local_weights().items():
            torch.testing.assert_close(tensor, after[name], rtol=1e-6, atol=1e-8)


def test_chunks_cover_every_number_of_the_model_and_of_its_optimizer_once(folders) -> None:
    with roles(folders["qwen2_untied"], 1, dtype="bfloat16", distributed=False) as (role,):
        num_parameters = sum(parameter.numel() for parameter in role.chunks[0].parameters())
        weights, states = model_chunks(role.chunks), optimizer_chunks(role.chunks, role.optimizer)
        assert step_count(role.optimizer) == 0
    assert sum(chunk.tensor.numel() for chunk in weights) == num_parameters
    # Two moments and a float32 master of each.
    assert sum(chunk.tensor.numel() for chunk in states) == 3 * num_parameters
    places = [(chunk.key, chunk.offsets) for chunk in weights + states]
    assert len(set(places)) == len(places)
    kinds = {chunk.key.split(".")[2] for chunk in states}
    assert kinds == {"exp_avg", "exp_avg_sq", "fp32_param"}


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(folders, tmp_path: Path) -> None:
    with roles(folders["qwen2_untied"], 1, dtype="float32", distributed=False) as (other,):
        place = save(other, tmp_path / "saved")
    with roles(folders["qwen3"], 1, dtype="float32", distributed=False) as (role,):
        before = {name: tensor.clone() for name, tensor in role.local_weights().items()}
        with pytest.raises(CheckpointError) as caught:
            load_weights(role.chunks, place)
        assert all(torch.equal(tensor, before[name]) for name, tensor in role.local_weights().items())
    message = str(caught.value)
    assert "q_layernorm.weight: missing" in message and "of another model: " in message


def test_weights_alone_are_no_training_state(folders, tmp_path: Path) -> None:
    with roles(folders["qwen3"], 1, dtype="float32", distributed=False) as (role,):
        chunks = [chunk._replace(tensor=chunk.tensor.clone()) for chunk in model_chunks(role.chunks)]
        write_description(tmp_path, write_chunks(tmp_path / file_name(0), chunks).chunks, {})
        load_weights(role.chunks, tmp_path)
        with pytest.raises(CheckpointError, match=r"damaged, or weights only: common\.pt"):
            load_training_state(role.chunks, role.optimizer, role.scheduler, tmp_path)


@given(shape=st.sampled_from([(1,), (7,), (3, 5), (1, 4), (6, 1)]), leading=st.integers(0, 1), data=st.data())
def test_a_range_of_elements_becomes_rectangles_of_its_place(shape: tuple[int, ...], leading: int, data: Any) -> None:
    """Whatever part of a parameter an optimizer owns, and wherever the parameter lies in the stored tensor."""
    numel, first_element = math.prod(shape), 11
    start = data.draw(st.integers(0, first_element + numel))
    length = data.draw(st.integers(0, first_element + numel + 5 - start))
    values = torch.arange(start, start + length, dtype=torch.float32)
    whole = (2,) * leading + tuple(size + 4 for size in shape)
    offsets = (1,) * leading + tuple(range(2, 2 + len(shape)))
    piece = _Piece("w", whole, offsets, leading, torch.zeros(shape), first_element, False)
    stored = torch.full(whole, -1.0)
    for place, part in _rectangles(piece, start, values):
        box = tuple(slice(at, at + size) for at, size in zip(place, part.shape, strict=True))
        assert stored[box].eq(-1).all(), "written twice"
        stored[box] = part
    expected = torch.full(whole, -1.0)
    box = tuple(slice(at, at + size) for at, size in zip(offsets, (1,) * leading + shape, strict=True))
    numbers = torch.arange(first_element, first_element + numel, dtype=torch.float32)
    owned = (numbers >= start) & (numbers < start + length)
    expected[box] = torch.where(owned, numbers, -1.0).view((1,) * leading + shape)
    assert torch.equal(stored, expected)
