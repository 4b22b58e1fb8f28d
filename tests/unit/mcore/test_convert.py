"""Hugging Face folders to Megatron checkpoints and back, in this process; what is refused leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_prime.config.schema import ParallelSection
from megatron_prime.errors import CheckpointError, WeightsError
from megatron_prime.mcore import convert
from megatron_prime.mcore.parallel import parallel_layout

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 139,
    "max_position_embeddings": 64,
}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for number, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        make().save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, Any]]:
    """The arguments that say where this process stands."""
    parallel = ParallelSection()
    with parallel_layout(parallel, seed=1) as layout:
        yield {"parallel": parallel, "layout": layout}


@pytest.fixture(scope="module")
def checkpoint(folders, running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "qwen2"
    convert.to_megatron(folders["qwen2"], target, dtype=None, **running)
    return target


@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_is_bitwise(folders, running, tmp_path: Path, family: str) -> None:
    convert.to_megatron(folders[family], tmp_path / "megatron", dtype=None, **running)
    convert.to_hf(tmp_path / "megatron", tmp_path / "back", like=None, dtype=None, **running)
    wanted, found = (load_file(path / "model.safetensors") for path in (folders[family], tmp_path / "back"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron"]


def test_precision_is_kept_unless_another_is_asked_for(folders, running, tmp_path: Path) -> None:
    weights = load_file(folders["llama"] / "model.safetensors")
    half = tmp_path / "half"
    shutil.copytree(folders["llama"], half)
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, half / "model.safetensors")
    for source, asked, expected in (
        (half, None, torch.bfloat16),
        (folders["llama"], None, torch.float32),
        (folders["llama"], "bfloat16", torch.bfloat16),
    ):
        name = f"{source.name}-{asked}"
        convert.to_megatron(source, tmp_path / name, dtype=asked, **running)
        convert.to_hf(tmp_path / name, tmp_path / f"{name}-back", like=None, dtype=None, **running)
        found = load_file(tmp_path / f"{name}-back" / "model.safetensors")
        assert all(torch.equal(found[key], weights[key].to(expected)) for key in weights)
        config = json.loads((tmp_path / f"{name}-back" / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == str(expected).removeprefix("torch.")


def test_a_checkpoint_carries_its_tokenizer_but_no_other_weights(folders, running, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders["qwen2"], source)
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"weights")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "tokenizer.json",
        "merges.txt",
        "LICENSE",
        "x.safetensors.index.json",
    ):
        (source / name).write_text("{}")
    convert.to_megatron(source, tmp_path / "megatron", dtype=None, **running)
    kept = {path.name for path in (tmp_path / "megatron" / convert.SIDE_FOLDER).iterdir()}
    assert kept == {"config.json", "generation_config.json", "tokenizer.json", "merges.txt", "LICENSE"}
    convert.to_hf(tmp_path / "megatron", tmp_path / "back", like=None, dtype=None, **running)
    assert (tmp_path / "back" / "LICENSE").exists() and (tmp_path / "back" / "merges.txt").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_occupied_target_is_refused_and_kept(folders, checkpoint, running, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    kept = target / "mine" if kind == "folder" else target
    kept.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert.to_megatron(folders["qwen2"], target, dtype=None, **running)
    with pytest.raises(CheckpointError, match="exists already"):
        convert.to_hf(checkpoint, target, like=None, dtype=None, **running)
    assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [target]


def test_an_incomplete_folder_is_refused(folders, running, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders["qwen3"], source)
    weights = load_file(source / "model.safetensors")
    removed = weights.pop("model.layers.1.self_attn.q_norm.weight")
    weights["model.norm.weight"] = removed
    save_file(weights, source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_norm\.weight: missing") as caught:
        convert.to_megatron(source, tmp_path / "target", dtype=None, **running)
    assert "model.norm.weight: has shape (16,)" in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ("llama", r"output_layer\.weight: missing\n.*linear_qkv\.bias: not a weight of this model"),
        ("qwen3", r"of another model: .*shape"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(folders, checkpoint, running, tmp_path, like, expected) -> None:
    with pytest.raises(CheckpointError, match=expected):
        convert.to_hf(checkpoint, tmp_path / "target", like=folders[like], dtype=None, **running)
    assert not list(tmp_path.iterdir())


def test_too_few_rows_of_the_vocabulary_are_refused(folders, checkpoint, running, tmp_path: Path) -> None:
    config = json.loads((folders["qwen2"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(CheckpointError, match=r"holds 256 rows of the embedding, .* says 400"):
        convert.to_hf(checkpoint, tmp_path / "target", like=tmp_path, dtype=None, **running)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("file", ["common.pt", ".metadata", "metadata.json", "__0_0.distcp"])
def test_a_truncated_checkpoint_is_refused(checkpoint, running, tmp_path: Path, file: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    whole = (source / file).read_bytes()
    (source / file).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CheckpointError, match=r"^[^\n]*source: [^\n]*damaged[^\n]*$"):
        convert.to_hf(source, tmp_path / "target", like=None, dtype=None, **running)
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_no_checkpoint_is_refused(folders, checkpoint, running, tmp_path: Path) -> None:
    for source in (tmp_path / "absent", folders["qwen2"]):
        with pytest.raises(CheckpointError, match="is no Megatron distributed checkpoint"):
            convert.to_hf(source, tmp_path / "target", like=None, dtype=None, **running)
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    shutil.rmtree(source / convert.SIDE_FOLDER)
    with pytest.raises(CheckpointError, match="pass --like"):
        convert.to_hf(source, tmp_path / "target", like=None, dtype=None, **running)


def test_a_failed_write_leaves_nothing(folders, running, tmp_path: Path) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*free space"):
            convert.to_megatron(folders["llama"], tmp_path / "target", dtype=None, **running)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert not list(tmp_path.iterdir())
