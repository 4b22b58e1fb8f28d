"""A checkpoint of any layout goes on at any other: weights, float32 masters, moments and step counts, bit for bit."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_files import megatron_loads
from parity_rows import ScaledLoss, make_rows
from safetensors.torch import load_file
from tiny_models import role_setup, save_tiny_model

from megatron_prime.checkpoint.manifest import committed, step_folder
from megatron_prime.config.schema import (
    CheckpointSection,
    OptimizerSection,
    ParallelSection,
)
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.checkpoint.checkpointer import Checkpointer
from megatron_prime.mcore.checkpoint.resume import find_checkpoint, identity_of
from megatron_prime.mcore.cpu import megatron_platform
from megatron_prime.mcore.parallel import Layout, parallel_layout
from megatron_prime.mcore.role import TrainableRole
from megatron_prime.weights.conversion import to_hf
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.stream import WeightExport

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2 interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2 distributed": {"context_parallel_size": 2, "use_distributed_optimizer": True},
    "dp2": {},
    "dp2 distributed": {"use_distributed_optimizer": True},
    "tp2 distributed": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
    "one rank": {"world_size": 1},
}
FAMILIES = {"float32": "qwen3", "bfloat16": "qwen2_untied"}
NUM_STEPS = 3


def parallel_of(name: str) -> ParallelSection:
    sizes: dict[str, Any] = {"world_size": 2, **LAYOUTS[name]}
    return ParallelSection(**sizes)


def build_role(folder: Path, dtype: Any, parallel: ParallelSection, layout: Layout) -> TrainableRole:
    setup = role_setup(folder, dtype, parallel, layout)
    optimizer = OptimizerSection(lr=1e-3, weight_decay=0.01, adam_eps=1e-5, lr_decay_style="linear", lr_warmup_steps=1)
    return TrainableRole(setup, optimizer, num_optimizer_steps=10)


def train(role: TrainableRole) -> float:
    rows = make_rows()
    return role.optimizer_step(rows, range(7), ScaledLoss(-1 / 20), temperature=0.9).metrics["loss"]


def whole_state(role: TrainableRole) -> dict[str, torch.Tensor]:
    """Weights, masters and moments under Hugging Face names, put together without the checkpoint's own code."""
    local = role.local_weights()
    by_storage = {id(parameter): name for name, parameter in zip(local, _parameters(role, local), strict=True)}
    states: dict[str, dict[str, torch.Tensor]] = {"weight": local}
    (inner,) = role.optimizer.chained_optimizers
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        states[kind] = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in local.items()}
    for parameter, main, start in _owned(inner):
        if id(parameter) not in by_storage:
            continue
        name = by_storage[id(parameter)]
        values = {"master": main} | {k: v for k, v in inner.optimizer.state[main].items() if k != "step"}
        for kind, value in values.items():
            states[kind][name].view(-1)[start : start + value.numel()] = value.detach().view(-1)
    if role.setup.parallel.use_distributed_optimizer and role.layout.num_copies > 1:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for tensor in states[kind].values():
                torch.distributed.all_reduce(tensor, group=role.layout.data_group)
    result = {}
    for kind, tensors in states.items():
        groups = role.layout.export_groups()
        export = WeightExport(role.specs, role.architecture, lambda tensors=tensors: tensors, groups)
        result |= {f"{kind} {name}": tensor.clone() for name, tensor in export}
    return result


def _parameters(role: TrainableRole, local: Mapping[str, torch.Tensor]) -> list[torch.nn.Parameter]:
    by_pointer = {parameter.data_ptr(): parameter for chunk in role.chunks for parameter in chunk.parameters()}
    return [by_pointer[tensor.data_ptr()] for tensor in local.values()]


def _owned(inner: Any) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """(model parameter, what the optimizer updates, where that begins in it)."""
    if hasattr(inner, "model_param_group_index_map"):
        return [
            (p, inner.param_groups[g]["params"][i], inner._get_model_param_range_map(p)["param"].start)
            for p, (g, i) in inner.model_param_group_index_map.items()
        ]
    if hasattr(inner, "float16_groups"):
        pairs = zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True)
        return [(p, main, 0) for models, mains in pairs for p, main in zip(models, mains, strict=True)]
    return [(p, p, 0) for group in inner.param_groups for p in group["params"]]


def _train_on(role: TrainableRole) -> dict[str, Any]:
    """What is there now, and what two more steps make of it."""
    state = whole_state(role)
    counts = {float(each["step"]) for each in role.optimizer.chained_optimizers[0].optimizer.state.values()}
    losses = [train(role), train(role)]
    return {"state": state, "counts": counts, "losses": losses, "lr": float(role.optimizer.param_groups[0]["lr"])}


def write(name: str, dtype: str, folder: Path, root: Path) -> dict[str, Any]:
    """Trains and saves; training goes on while the files are written, or after that."""
    parallel = parallel_of(name)
    with parallel_layout(parallel, seed=1) as layout:
        role = build_role(folder, dtype, parallel, layout)
        role.load_hf(HfFolder(folder))
        losses = [train(role) for _ in range(NUM_STEPS)]
        place = root / name
        place.mkdir(exist_ok=True)
        saver = Checkpointer(place, {"model": role}, CheckpointSection(), {"model": str(folder)}, None)
        background = name != "tp2"
        saver.save(NUM_STEPS, {"losses": losses}, background=background)
        assert background or len(committed(place)) == 1
        found = _train_on(role)
        saver.finish()
    return found


def read(name: str, writers: list[str], dtype: str, folder: Path, root: Path) -> dict[tuple[str, str], Any]:
    """Goes on from what every layout has saved."""
    parallel = parallel_of(name)
    found = {}
    with parallel_layout(parallel, seed=2) as layout:
        for writer in writers:
            role = build_role(folder, dtype, parallel, layout)
            checkpoint = find_checkpoint(root / writer, identity_of({"model": role.architecture}, dtype))
            saver = Checkpointer(
                root / writer, {"model": role}, CheckpointSection(), {"model": str(folder)}, checkpoint
            )
            saved = saver.restore()
            assert saved is not None and len(saved["losses"]) == NUM_STEPS
            found[writer, name] = _train_on(role)
    return found


@pytest.mark.parametrize(
    ("dtype", "writers", "readers"),
    [
        ("float32", ["tp2", "pp2 interleaved", "dp2 distributed"], ["tp2", "cp2 distributed", "one rank"]),
        ("bfloat16", ["tp2", "dp2 distributed"], ["dp2", "tp2 distributed"]),
    ],
)
def test_what_any_layout_saved_goes_on_at_any_other(
    gloo_pool, tmp_path: Path, dtype: str, writers: list[str], readers: list[str]
) -> None:
    folder = save_tiny_model(FAMILIES[dtype], tmp_path / "model")
    written, found = {}, {}
    for name in writers:
        size = LAYOUTS[name].get("world_size", 2)
        written[name] = gloo_pool.run(size, write, name, dtype, folder, tmp_path)[0]
    for name in readers:
        found |= gloo_pool.run(LAYOUTS[name].get("world_size", 2), read, name, writers, dtype, folder, tmp_path)[0]
    assert len(found) == len(writers) * len(readers)
    for (writer, reader), result in found.items():
        expected = written[writer]
        assert result["counts"] == expected["counts"] == {float(NUM_STEPS)}
        assert result["lr"] == expected["lr"]
        assert result["state"].keys() == expected["state"].keys()
        for name, tensor in expected["state"].items():
            assert torch.equal(tensor, result["state"][name]), (writer, reader, name)
        if dtype == "float32":
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5), (writer, reader)
        if writer == reader:
            assert result["losses"] == expected["losses"]


def megatron_reads(name: str, dtype: str, folder: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    parallel = parallel_of(name)
    with parallel_layout(parallel, seed=3) as layout:
        role = build_role(folder, dtype, parallel, layout)
        with megatron_platform():
            megatron_loads(role.chunks[0], checkpoint)
        return dict(role.export_weights())


def test_megatron_and_the_converter_read_the_models(gloo_pool, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen3", tmp_path / "model")
    written = gloo_pool.run(2, write, "tp2 distributed", "float32", folder, tmp_path)[0]["state"]
    checkpoint = step_folder(tmp_path / "tp2 distributed", NUM_STEPS) / "model"
    to_hf(checkpoint, tmp_path / "exported")
    converted = load_file(tmp_path / "exported" / "model.safetensors")
    loaded = gloo_pool.run(2, megatron_reads, "dp2", "float32", folder, checkpoint)[0]
    assert loaded.keys() == converted.keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, written[f"weight {name}"])
        assert torch.equal(loaded[name], tensor)


def one_rank_cannot_write(folder: Path, root: Path) -> tuple[str, list[str], list[str]]:
    """What every rank is told when the second one may not write large files, and what is left then and a save later."""
    parallel = ParallelSection(world_size=2)
    with parallel_layout(parallel, seed=1) as layout:
        role = build_role(folder, "float32", parallel, layout)
        saver = Checkpointer(root, {"model": role}, CheckpointSection(), {"model": str(folder)}, None)
        saver.save(1, {})
        saver.finish()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if layout.dp_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        try:
            saver.save(2, {})
            with pytest.raises(CheckpointError) as caught:
                while True:
                    train(role)
                    saver.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        left = sorted(path.name for path in root.iterdir())
        torch.distributed.barrier()
        saver.save(3, {})
        saver.finish()
        return str(caught.value), left, sorted(path.name for path in root.iterdir())


def test_a_rank_that_cannot_write_is_heard_by_all(gloo_pool, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    (tmp_path / "saved").mkdir()
    first, second = gloo_pool.run(2, one_rank_cannot_write, folder, tmp_path / "saved")
    assert first == second
    message, left, later = first
    assert "step_00000002: cannot be written: rank 1: [Errno 27] File too large" in message
    assert "(kept: step_00000001)" in message
    assert left == ["step_00000001"] and later == ["step_00000001", "step_00000003"]
