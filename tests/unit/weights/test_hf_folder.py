import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.hf_writer import HfWriter

NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, model_folders: dict[str, Path]) -> Path:
    """A private copy of an untied Qwen2 model in one file."""
    return shutil.copytree(model_folders["qwen2-untied"], tmp_path / "model")


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in several files."""
    export(folder, folder.with_name("sharded"), max_shard_bytes=20_000)
    return folder.with_name("sharded")


def export(
    source: Path,
    target: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 10**9,
    overwrite: bool = False,
) -> None:
    weights = load_file(source / "model.safetensors")
    architecture = read_architecture(source)
    with HfWriter(target, source, architecture, dtype, max_shard_bytes, overwrite=overwrite) as writer:
        for name, tensor in weights.items():
            writer.add(name, tensor)


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


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


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
