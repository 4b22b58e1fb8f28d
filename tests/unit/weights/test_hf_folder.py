"""Hugging Face folders that are read: names, slices, and every problem of a folder at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def problems(folder: Path) -> list[str]:
    with pytest.raises(WeightsError) as caught:
        HfFolder(folder).validate(read_architecture(folder))
    return str(caught.value).splitlines()


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces (or with None removes) tensors of `model.safetensors`; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_every_model_that_transformers_saves_is_valid(model_folder: Path) -> None:
    HfFolder(model_folder).validate(read_architecture(model_folder))


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_names_shapes_dtypes_and_slices(layout: str, folder: Path, request: pytest.FixtureRequest) -> None:
    weights = load_file(folder / "model.safetensors")
    reader = HfFolder(request.getfixturevalue(layout))
    reader.validate(read_architecture(folder))
    assert reader.names() == sorted(weights)
    assert {name: reader.shape(name) for name in reader.names()} == {n: tuple(t.shape) for n, t in weights.items()}
    assert reader.dtype(UP) == torch.float32
    assert torch.equal(reader.fetch(UP, (slice(3, 7), slice(0, 48))), weights[UP][3:7])
    assert torch.equal(reader.fetch(UP, (slice(0, 40), slice(5, 9))), weights[UP][:, 5:9])
    assert reader.fetch(UP, (slice(40, 40), slice(0, 48))).shape == (0, 48)


def test_all_problems_at_once(folder: Path) -> None:
    rewrite(
        folder,
        model__norm__weight=None,
        lm_head__weight=torch.zeros(101, 47),
        score__weight=torch.zeros(1, 48),
        model__layers__0__mlp__up_proj__weight=torch.zeros(40, 48, dtype=torch.int8),
    )
    file = folder / "model.safetensors"
    assert problems(folder) == [
        f"{folder}: {NORM}: missing",
        f"{file}: lm_head.weight: has shape (101, 47), config.json says (101, 48)",
        f"{file}: {UP}: stored as I8, not as floating-point numbers",
        f"{file}: score.weight: not a weight of this qwen2 architecture",
    ]
    with pytest.raises(WeightsError, match="stored as I8"):
        HfFolder(folder).dtype(UP)


def test_harmless_extras_are_ignored(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    folder = shutil.copytree(model_folders["llama3-tied"], tmp_path / "model")
    rewrite(
        folder,
        lm_head__weight=torch.zeros(101, 48),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8),
    )
    HfFolder(folder).validate(read_architecture(folder))


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    rewrite(folder, lm_head__weight=None)
    assert problems(folder) == [f"{folder}: lm_head.weight: missing"]


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    (line,) = problems(folder)
    assert line.startswith(f"{file}: damaged or truncated: ")


def test_missing_and_truncated_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    lines = problems(sharded)
    assert len(lines) == 2
    assert lines[0] == f"{first}: missing; model.safetensors.index.json names it"
    assert lines[1].startswith(f"{second}: damaged or truncated: ")
    lost = next(iter(set(HfFolder(sharded.with_name("model")).names()) - set(HfFolder(sharded).names())))
    with pytest.raises(WeightsError, match=f"{lost}: no such tensor"):
        HfFolder(sharded).fetch(lost, (slice(0, 1),))


def test_index_that_promises_too_much_or_nothing(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = next(file for file in index["weight_map"].values() if file != index["weight_map"][NORM])
    path.write_text(json.dumps(index))
    assert problems(sharded) == [f"{sharded}: {NORM}: missing"]
    path.write_text(json.dumps({"weight_map": {}}))
    assert len(problems(sharded)) == len(index["weight_map"])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"index\.json: "):
        HfFolder(sharded)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"has neither model\.safetensors nor"):
        HfFolder(tmp_path)
