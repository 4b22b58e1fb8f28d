"""Folders that are written: what transformers reads from them, what goes along, and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from written_folders import export

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.hf_writer import HfWriter, plan_shards

NORM = "model.norm.weight"


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


def test_written_folder_loads_in_transformers_with_equal_logits(model_folder: Path, tmp_path: Path) -> None:
    export(model_folder, tmp_path / "new" / "out", max_shard_bytes=20_000)
    out = tmp_path / "new" / "out"
    assert (out / "model.safetensors.index.json").exists()
    assert torch.equal(logits(out), logits(model_folder))
    tokenize, expected = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, model_folder))
    assert tokenize("4 + 5 = 9").input_ids == expected("4 + 5 = 9").input_ids != []
    assert (out / "generation_config.json").read_bytes() == (model_folder / "generation_config.json").read_bytes()
    assert read_architecture(out) == read_architecture(model_folder)
    HfFolder(out).validate(read_architecture(out))


def test_shards_keep_their_limit(folder: Path, sharded: Path) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize(
    ("key", "other"), [("dtype", None), ("torch_dtype", None), ("dtype", "torch_dtype"), (None, None)]
)
def test_dtype_and_architecture_are_set(folder: Path, tmp_path: Path, key: str | None, other: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    config |= {name: "float32" for name in (key, other) if name} | {"architectures": ["SomethingElse"]}
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForCausalLM"]
    names = [name for name in (key, other) if name] or ["torch_dtype"]
    assert {k: v for k, v in written.items() if "dtype" in k} == dict.fromkeys(names, "bfloat16")
    assert HfFolder(tmp_path / "out").dtype(NORM) == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight, load_file(folder / "model.safetensors")[NORM].bfloat16())


def test_added_tensors_are_copied(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    with HfWriter(tmp_path / "out", folder, read_architecture(folder), torch.float32) as writer:
        for name, tensor in weights.items():
            kept = tensor.clone()
            writer.add(name, tensor.requires_grad_())
            tensor.data.zero_()
            weights[name] = kept
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


def test_transposed_memory_is_written_in_order(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    with HfWriter(tmp_path / "out", folder, read_architecture(folder), torch.float32) as writer:
        for name, tensor in weights.items():
            writer.add(name, tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


def test_failure_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(RuntimeError, match="of the caller"),
        HfWriter(tmp_path / "out", folder, read_architecture(folder), torch.float32, 1) as writer,
    ):
        writer.add(NORM, torch.zeros(48))
        writer.add("lm_head.weight", torch.zeros(101, 48))
        raise RuntimeError("of the caller")
    assert sorted(tmp_path.iterdir()) == before


def test_missing_weights_leave_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(WeightsError) as caught,
        HfWriter(tmp_path / "out", folder, read_architecture(folder), torch.float32) as writer,
    ):
        writer.add(NORM, torch.zeros(48))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(HfFolder(folder).names()) - 1 and all("was never added" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (["model.other"], (48,), "model.other: unknown"),
        ([NORM, NORM], (48,), "or added twice"),
        ([NORM], (1, 48), r"shape \(1, 48\), expected \(48,\)"),
    ],
)
def test_wrong_additions(folder: Path, tmp_path: Path, names: list[str], shape: tuple[int, ...], expected: str) -> None:
    with (
        pytest.raises(WeightsError, match=expected),
        HfWriter(tmp_path / "out", folder, read_architecture(folder), torch.float32) as writer,
    ):
        for name in names:
            writer.add(name, torch.zeros(shape))
    assert not (tmp_path / "out").exists()


def test_existing_targets(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    export(folder, target)  # an empty folder is no obstacle
    (target / "stale.txt").touch()
    with pytest.raises(WeightsError, match="exists and is not empty"):
        export(folder, target)
    assert (target / "stale.txt").exists()
    export(folder, target, overwrite=True)
    assert not (target / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    with pytest.raises(WeightsError, match="is not a folder"):
        export(folder, folder / "config.json")


def test_a_folder_can_be_overwritten_by_what_is_read_from_it(folder: Path) -> None:
    reader, architecture = HfFolder(folder), read_architecture(folder)
    before = load_file(folder / "model.safetensors")
    with HfWriter(folder, folder, architecture, torch.float32, overwrite=True) as writer:
        for name in reader.names():
            writer.add(name, reader.fetch(name, tuple(slice(0, size) for size in reader.shape(name))))
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (folder / "tokenizer.json").exists()


def test_tensors_go_into_files_in_order_up_to_the_limit() -> None:
    shapes = {"a": (10,), "b": (5, 2), "c": (40,), "d": (1,), "e": ()}
    assert plan_shards(shapes, itemsize=4, max_shard_bytes=10**6) == {"model.safetensors": list(shapes)}
    assert plan_shards(shapes, itemsize=4, max_shard_bytes=80) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],  # larger than the limit by itself
        "model-00003-of-00003.safetensors": ["d", "e"],
    }
