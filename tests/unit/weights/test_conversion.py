"""Hugging Face folders to Megatron checkpoints and back, in this process; what is refused leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_prime.errors import CheckpointError, WeightsError
from megatron_prime.weights import conversion
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.conversion_plan import Cut, plan_conversion
from megatron_prime.weights.hf_folder import expected_shapes

ROOT = Path(__file__).resolve().parents[3]
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "tie_word_embeddings": True}
"""About 0.4 GB whose largest tensor is 8 MB."""
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
def checkpoint(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "qwen2"
    conversion.to_megatron(folders["qwen2"], target)
    return target


@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_is_bitwise(folders, tmp_path: Path, family: str) -> None:
    conversion.to_megatron(folders[family], tmp_path / "megatron")
    conversion.to_hf(tmp_path / "megatron", tmp_path / "back")
    wanted, found = (load_file(path / "model.safetensors") for path in (folders[family], tmp_path / "back"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron"]


def test_precision_is_kept_unless_another_is_asked_for(folders, tmp_path: Path) -> None:
    weights = load_file(folders["llama"] / "model.safetensors")
    half = tmp_path / "half"
    shutil.copytree(folders["llama"], half)
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, half / "model.safetensors")
    for source, asked, expected in (
        (half, None, torch.bfloat16),
        (folders["llama"], None, torch.float32),
        (folders["llama"], torch.bfloat16, torch.bfloat16),
    ):
        name = f"{source.name}-{asked}"
        conversion.to_megatron(source, tmp_path / name, dtype=asked)
        conversion.to_hf(tmp_path / name, tmp_path / f"{name}-back")
        found = load_file(tmp_path / f"{name}-back" / "model.safetensors")
        assert all(torch.equal(found[key], weights[key].to(expected)) for key in weights)
        config = json.loads((tmp_path / f"{name}-back" / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == str(expected).removeprefix("torch.")


def test_a_checkpoint_carries_its_tokenizer_but_no_other_weights(folders, tmp_path: Path) -> None:
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
    conversion.to_megatron(source, tmp_path / "megatron")
    kept = {path.name for path in (tmp_path / "megatron" / conversion.SIDE_FOLDER).iterdir()}
    assert kept == {"config.json", "generation_config.json", "tokenizer.json", "merges.txt", "LICENSE"}
    conversion.to_hf(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / "LICENSE").exists() and (tmp_path / "back" / "merges.txt").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_occupied_target_is_refused_and_kept(folders, checkpoint, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    kept = target / "mine" if kind == "folder" else target
    kept.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        conversion.to_megatron(folders["qwen2"], target)
    with pytest.raises(CheckpointError, match="exists already"):
        conversion.to_hf(checkpoint, target)
    assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [target]


def test_an_incomplete_folder_is_refused(folders, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders["qwen3"], source)
    weights = load_file(source / "model.safetensors")
    removed = weights.pop("model.layers.1.self_attn.q_norm.weight")
    weights["model.norm.weight"] = removed
    save_file(weights, source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_norm\.weight: missing") as caught:
        conversion.to_megatron(source, tmp_path / "target")
    assert "model.norm.weight: has shape (16,)" in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ("llama", r"output_layer\.weight: missing\n.*linear_qkv\.bias: not a weight of this model"),
        ("qwen3", r"of another model: .*shape"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(folders, checkpoint, tmp_path, like, expected) -> None:
    with pytest.raises(CheckpointError, match=expected):
        conversion.to_hf(checkpoint, tmp_path / "target", like=folders[like])
    assert not list(tmp_path.iterdir())


def test_too_few_rows_of_the_vocabulary_are_refused(folders, checkpoint, tmp_path: Path) -> None:
    config = json.loads((folders["qwen2"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(CheckpointError, match=r"holds 256 rows of the embedding, .* says 400"):
        conversion.to_hf(checkpoint, tmp_path / "target", like=tmp_path)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("file", ["common.pt", ".metadata", "metadata.json", "__0_0.distcp"])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path: Path, file: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    whole = (source / file).read_bytes()
    (source / file).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CheckpointError, match=r"^[^\n]*source: [^\n]*damaged[^\n]*$"):
        conversion.to_hf(source, tmp_path / "target")
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_no_checkpoint_is_refused(folders, checkpoint, tmp_path: Path) -> None:
    for source in (tmp_path / "absent", folders["qwen2"]):
        with pytest.raises(CheckpointError, match="is no Megatron distributed checkpoint"):
            conversion.to_hf(source, tmp_path / "target")
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    shutil.rmtree(source / conversion.SIDE_FOLDER)
    with pytest.raises(CheckpointError, match="pass --like"):
        conversion.to_hf(source, tmp_path / "target")


def test_progress_ends_at_the_bytes_of_the_plan(folders, tmp_path: Path) -> None:
    architecture = read_architecture(folders["qwen3"])
    cut = Cut(tp_size=2, pp_size=2)
    told: list[tuple[int, int]] = []
    conversion.to_megatron(folders["qwen3"], tmp_path / "megatron", cut=cut, progress=lambda *seen: told.append(seen))
    kinds: dict[str, Any] = {"stored": torch.float32, "dtype": torch.float32}
    plan = plan_conversion(architecture, megatron=True, cut=cut, **kinds)
    assert told[-1] == (plan.num_bytes, plan.num_bytes) and told == sorted(set(told))
    files = {path.name: path.stat().st_size for path in (tmp_path / "megatron").glob("*.distcp")}
    assert files.keys() == plan.files.keys() and all(files[name] > size for name, size in plan.files.items())
    told.clear()
    conversion.to_hf(tmp_path / "megatron", tmp_path / "back", progress=lambda *seen: told.append(seen))
    plan = plan_conversion(architecture, megatron=False, **kinds)
    assert told[-1] == (plan.num_bytes, plan.num_bytes) and list(plan.files) == ["model.safetensors"]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        folders["qwen3"] / "model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def stopped(folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By direction: the source of a conversion that was killed half-way, and the folder that it left."""
    root = tmp_path_factory.mktemp("stopped")
    conversion.to_megatron(folders["llama"], root / "megatron")
    code = (
        "import os, sys; from pathlib import Path; from megatron_prime.weights.conversion import to_megatron, to_hf;"
        "stop = lambda done, total: os._exit(9) if 2 * done > total else None;"
        "globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), progress=stop)"
    )
    left = {}
    for way, source in (("to_megatron", folders["llama"]), ("to_hf", root / "megatron")):
        command = [sys.executable, "-c", code, way, str(source), str(root / way)]
        assert subprocess.run(command, check=False, timeout=60).returncode == 9 and not (root / way).exists()
        left[way] = (source, root / f"{way}.writing")
    return left


@pytest.mark.parametrize("way", ["to_megatron", "to_hf"])
@pytest.mark.parametrize("harm", ["none", "cut off", "changed", "other precision"])
def test_a_killed_conversion_goes_on(folders, stopped, tmp_path: Path, way: str, harm: str, monkeypatch) -> None:
    source, left = stopped[way]
    target, writing, whole = tmp_path / "target", tmp_path / "target.writing", tmp_path / "whole"
    shutil.copytree(left, writing)
    (file,) = [path for path in writing.iterdir() if path.suffix in (".distcp", ".safetensors")]
    # The newest part is the one that a stopped machine may have lost.
    if harm == "cut off":
        os.truncate(file, file.stat().st_size - 100)
    elif harm == "changed":
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    dtype = torch.bfloat16 if harm == "other precision" else None

    read: list[str] = []
    reader = conversion.HfFolder if way == "to_megatron" else conversion.MegatronFolder
    fetch = reader.fetch
    monkeypatch.setattr(reader, "fetch", lambda self, what, *rest: read.append(str(what)) or fetch(self, what, *rest))
    getattr(conversion, way)(source, target, dtype=dtype)
    num_read = len(read)
    getattr(conversion, way)(source, whole, dtype=dtype)
    num_all = len(read) - num_read
    assert num_read == num_all if harm == "other precision" else 0 < num_read < num_all
    assert not writing.exists()
    for path in whole.iterdir():
        assert path.is_dir() or path.name == ".metadata" or (target / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in target.iterdir()} == {path.name for path in whole.iterdir()}
    if way == "to_megatron":
        conversion.to_hf(target, tmp_path / "back", dtype=torch.float32)
        found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "back", folders["llama"]))
        rounded = dtype or torch.float32
        assert all(torch.equal(found[name], wanted[name].to(rounded).float()) for name in wanted)


def test_memory_is_a_few_tensors_not_the_model(tmp_path: Path) -> None:
    architecture_file = ROOT / "configs" / "models" / "arithmetic" / "config.json"
    config = json.loads(architecture_file.read_text()) | WIDE
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(tmp_path / "source")
    tensors = {name: torch.full(shape, 0.5) for name, shape in expected_shapes(architecture).items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    del tensors
    code = (
        "import sys; from pathlib import Path; from megatron_prime.weights.conversion import to_megatron, to_hf;"
        "memory = lambda: next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmHWM'));"
        "before = memory(); source, megatron, back = map(Path, sys.argv[1:]); to_megatron(source, megatron);"
        "between = memory(); to_hf(megatron, back); print(between - before, memory() - before)"
    )
    paths = [str(tmp_path / name) for name in ("source", "megatron", "back")]
    printed = subprocess.run(
        [sys.executable, "-c", code, *paths], check=True, capture_output=True, text=True, timeout=120
    )
    kinds: dict[str, Any] = {"stored": torch.float32, "dtype": torch.float32}
    for used, megatron in zip(map(int, printed.stdout.split()), (True, False), strict=True):
        plan = plan_conversion(architecture, megatron=megatron, **kinds)
        assert used < plan.peak_bytes < plan.num_bytes / 2, (used, plan)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (Cut(tp_size=3), r"tensor_model_parallel_size: 3 does not divide"),
        (Cut(pp_size=3), r"pipeline_model_parallel_size: 3 does not divide num_hidden_layers 2"),
    ],
)
def test_an_impossible_layout_is_refused(folders, tmp_path: Path, cut: Cut, expected: str) -> None:
    with pytest.raises(WeightsError, match=expected):
        conversion.to_megatron(folders["qwen2"], tmp_path / "target", cut=cut)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_goes_on_when_there_is_room(folders, tmp_path: Path) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*free space .*remove target.writing"):
            conversion.to_megatron(folders["llama"], tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["target.writing"]
    conversion.to_megatron(folders["llama"], tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
