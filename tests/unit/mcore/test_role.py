"""A model in its role on one rank: its log-probs beside transformers', its optimizer step beside a plain Adam."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity_rows import TEMPERATURE, ScaledLoss, expected_logprobs, make_rows
from safetensors.torch import load_file
from tiny_models import role_setup, save_tiny_model

from megatron_prime.config.schema import OptimizerSection, ParallelSection
from megatron_prime.errors import NonFiniteError
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, TrainableRole
from megatron_prime.weights.hf_folder import HfFolder

LR, EPSILON = 1e-2, 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture
def role(folder: Path) -> Iterator[TrainableRole]:
    parallel = ParallelSection()
    with parallel_layout(parallel, seed=1) as layout:
        optimizer = OptimizerSection(lr=LR, adam_eps=EPSILON, clip_grad=0.0)
        role = TrainableRole(role_setup(folder, "float32", parallel, layout), optimizer, num_optimizer_steps=5)
        role.load_hf(HfFolder(folder))
        yield role


def weights_of(role: ModelRole) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in role.local_weights().items()}


def test_logprobs_are_those_of_transformers_row_by_row(role: TrainableRole, folder: Path) -> None:
    rows = make_rows()
    found = role.logprobs(rows, temperature=TEMPERATURE)
    expected = expected_logprobs(folder, rows)
    assert found.dtype == torch.float32 and found.shape == rows.mask.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)
    assert found[~rows.mask].eq(0).all()


def test_a_step_is_adam_on_the_gradient_of_the_selected_rows(role: TrainableRole) -> None:
    rows, selected = make_rows(), [0, 2, 5]
    before = weights_of(role)
    found = role.optimizer_step(rows, selected, ScaledLoss(-0.05), temperature=TEMPERATURE, keep_logprobs=True)
    # Adam's first step with the bias taken out is lr * g / (|g| + epsilon).
    gradients = {name: p.main_grad for chunk in role.chunks for name, p in chunk.named_parameters()}
    moved = 0.0
    for name, parameter in role.local_weights().items():
        gradient = gradients[name].double()
        expected = before[name].double() - LR * gradient / (gradient.abs() + EPSILON)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
        moved = max(moved, float((parameter - before[name]).abs().max()))
    assert moved > LR / 2
    norm = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    assert found.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (found.metrics["skipped"], found.metrics["lr"]) == (0.0, LR)
    assert found.logprobs is not None
    assert found.metrics["loss"] == pytest.approx(-0.05 * float(found.logprobs.sum()), rel=1e-5)


def test_kept_logprobs_are_from_before_the_step_and_of_the_selected_rows_only(role: TrainableRole) -> None:
    rows, selected = make_rows(), [1, 4]
    scores = role.logprobs(rows)
    found = role.optimizer_step(rows, selected, ScaledLoss(-0.05), keep_logprobs=True)
    assert found.logprobs is not None
    torch.testing.assert_close(found.logprobs[selected], scores[selected], rtol=0, atol=1e-5)
    others = [row for row in range(len(rows.mask)) if row not in selected]
    assert found.logprobs[others].eq(0).all()
    assert (role.logprobs(rows) - scores)[selected].abs().max() > 1e-3


def test_measuring_changes_no_weight_and_parts_sum_to_the_whole(role: TrainableRole) -> None:
    rows = make_rows()
    before = weights_of(role)
    whole = role.measure(rows, range(7), ScaledLoss(-0.05)).metrics
    parts = [role.measure(rows, [row], ScaledLoss(-0.05)).metrics for row in range(7)]
    assert whole["loss"] == pytest.approx(sum(part["loss"] for part in parts), rel=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in role.local_weights().items())


def test_a_loss_that_is_not_finite_changes_nothing_and_comes_with_the_logprobs(role: TrainableRole) -> None:
    rows = make_rows()
    before, scores = weights_of(role), role.logprobs(rows)
    with pytest.raises(NonFiniteError) as caught:
        role.optimizer_step(rows, range(7), ScaledLoss(torch.nan), keep_logprobs=True)
    assert all(torch.equal(weight, before[name]) for name, weight in role.local_weights().items())
    assert caught.value.logprobs is not None
    torch.testing.assert_close(caught.value.logprobs, scores, rtol=0, atol=1e-5)


def test_exported_weights_are_the_folders_until_a_step_is_made(role: TrainableRole, folder: Path) -> None:
    start = load_file(folder / "model.safetensors")
    exported = dict(role.export_weights())
    assert exported.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(tensor, start[name]) for name, tensor in exported.items())
    role.optimizer_step(make_rows(), range(7), ScaledLoss(-0.05))
    assert not torch.equal(dict(role.export_weights())["model.norm.weight"], start["model.norm.weight"])
