"""Import and export on one rank; several ranks are in tests/distributed/test_weight_stream.py."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.sharding import Slices, local_shape
from megatron_prime.weights.stream import ParallelGroups, export_stream, import_weights


class CountingFolder(HfFolder):
    """Counts what is read."""

    num_bytes = 0

    def fetch(self, name: str, slices: Slices) -> Tensor:
        tensor = super().fetch(name, slices)
        self.num_bytes += tensor.nbytes
        return tensor


def empty_parameters(
    architecture: ModelArchitecture, tp_size: int, padded: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.nn.Parameter]:
    shapes = {
        spec.megatron_name: local_shape(spec, architecture, tp_size=tp_size, padded_vocab_size=padded)
        for spec in weight_specs(architecture)
    }
    return {name: torch.nn.Parameter(torch.full(shape, math.nan, dtype=dtype)) for name, shape in shapes.items()}


def test_import_then_export_is_bitwise(model_folder: Path) -> None:
    architecture = read_architecture(model_folder)
    specs = weight_specs(architecture)
    padded = architecture.padded_vocab_size(128, 1)
    local = empty_parameters(architecture, 1, padded)
    import_weights(specs, architecture, HfFolder(model_folder), local, tp_rank=0, tp_size=1, padded_vocab_size=padded)
    exported = dict(export_stream(specs, architecture, local, ParallelGroups()))
    original = load_file(model_folder / "model.safetensors")
    assert list(exported) == [name for spec in specs for name in spec.hf_names]
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    assert not any(tensor.requires_grad for tensor in exported.values())


@pytest.mark.parametrize("tp_size", [2, 4])
def test_import_reads_only_its_slices(model_folder: Path, tp_size: int) -> None:
    architecture = read_architecture(model_folder)
    specs = weight_specs(architecture)
    padded = architecture.padded_vocab_size(1, tp_size)
    num_bytes = []
    for rank in range(tp_size):
        folder = CountingFolder(model_folder)
        local = empty_parameters(architecture, tp_size, padded)
        import_weights(specs, architecture, folder, local, tp_rank=rank, tp_size=tp_size, padded_vocab_size=padded)
        num_bytes.append(folder.num_bytes)
    whole = sum(tensor.nbytes for tensor in load_file(model_folder / "model.safetensors").values())
    held_by_all = sum(4 * math.prod(shape) for spec in specs if spec.is_whole for shape in spec.hf_shapes)
    assert sum(num_bytes) == whole + (tp_size - 1) * held_by_all


def test_import_of_some_layers_reads_nothing_else_and_casts(model_folders: dict[str, Path]) -> None:
    path = model_folders["qwen3-tied"]
    architecture = read_architecture(path)
    local = empty_parameters(architecture, 1, 128, torch.bfloat16)
    local = {name: parameter for name, parameter in local.items() if name.startswith("decoder.layers.1.mlp.")}
    folder = CountingFolder(path)
    import_weights(weight_specs(architecture), architecture, folder, local, tp_rank=0, tp_size=1, padded_vocab_size=128)
    original = load_file(path / "model.safetensors")
    down = original["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(local["decoder.layers.1.mlp.linear_fc2.weight"], down.bfloat16())
    assert folder.num_bytes == 3 * down.nbytes


def test_import_lists_every_problem_and_writes_nothing(model_folders: dict[str, Path]) -> None:
    path = model_folders["qwen2-tied"]
    architecture = read_architecture(path)
    norm = torch.zeros(48)
    local = {
        "decoder.final_layernorm.weight": norm,
        "output_layer.weight": torch.zeros(128, 48),
        "decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(48, 41),
    }
    with pytest.raises(WeightsError) as caught:
        import_weights(
            weight_specs(architecture), architecture, HfFolder(path), local, tp_rank=0, tp_size=1, padded_vocab_size=128
        )
    assert str(caught.value).splitlines() == [
        "output_layer.weight: not a weight of this qwen2 architecture",
        "decoder.layers.0.mlp.linear_fc2.weight: the shard has shape (48, 41), expected (48, 40)",
    ]
    assert torch.count_nonzero(norm) == 0


def test_export_lists_every_problem(model_folders: dict[str, Path]) -> None:
    architecture = read_architecture(model_folders["llama2"])
    local: dict[str, Tensor] = dict(empty_parameters(architecture, 1, 128))
    del local["output_layer.weight"]
    local["decoder.final_layernorm.weight"] = torch.zeros(33)
    local["decoder.final_layernorm.bias"] = torch.zeros(32)
    local["embedding.word_embeddings.weight"] = torch.tensor(0.0)
    local["decoder.layers.0.mlp.linear_fc2.weight"] = torch.tensor(0.0)
    with pytest.raises(WeightsError) as caught:
        next(export_stream(weight_specs(architecture), architecture, local, ParallelGroups()))
    assert str(caught.value).splitlines() == [
        "embedding.word_embeddings.weight: the shard has shape (), expected (101, 32)",
        "decoder.layers.0.mlp.linear_fc2.weight: the shard has shape (), expected (32, 40)",
        "decoder.final_layernorm.weight: the shard has shape (33,), expected (32,)",
        "decoder.final_layernorm.bias: not a weight of this llama architecture",
        "output_layer.weight: no rank has it",
    ]


def test_export_converts(model_folders: dict[str, Path]) -> None:
    architecture = read_architecture(model_folders["llama3-tied"])
    local = {name: p.data.fill_(1 / 3) for name, p in empty_parameters(architecture, 1, 104).items()}
    specs = weight_specs(architecture)
    for name, tensor in export_stream(specs, architecture, local, ParallelGroups(), dtype=torch.bfloat16):
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.unique().tolist() == [torch.tensor(1 / 3).bfloat16().item()]
