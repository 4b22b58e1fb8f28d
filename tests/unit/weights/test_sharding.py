"""Cutting and merging, against slow loops over rows and as bitwise round trips."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.families import Sharding, WeightSpec, weight_specs
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.sharding import Slices, local_shape, local_slice, merge

SMALL = ModelArchitecture(
    family="qwen2",
    num_layers=1,
    hidden_size=6,
    ffn_hidden_size=8,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=2,
    vocab_size=13,
    max_position_embeddings=8,
    rotary_base=1e4,
    rope_scaling=None,
    layernorm_epsilon=1e-5,
    tied_embeddings=False,
    add_qkv_bias=True,
    qk_layernorm=False,
    hf_config={},
)
COLUMN = WeightSpec(
    megatron_name="column",
    transformer_engine_name="column",
    hf_names=("c",),
    sharding=Sharding.COLUMN,
    hf_shapes=((8, 3),),
    layer=None,
    stage="head",
)


class Source:
    """Random tensors by Hugging Face name."""

    def __init__(self, specs: list[WeightSpec], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.tensors = {
            name: torch.randn(shape).to(dtype)
            for spec in specs
            for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
        }

    def fetch(self, name: str, slices: Slices) -> Tensor:
        return self.tensors[name][slices]


def cut_all(
    spec: WeightSpec, architecture: ModelArchitecture, source: Source, tp_size: int, padded: int
) -> list[Tensor]:
    return [
        local_slice(spec, architecture, source.fetch, tp_rank=rank, tp_size=tp_size, padded_vocab_size=padded)
        for rank in range(tp_size)
    ]


def by_sharding(sharding: Sharding) -> WeightSpec:
    return COLUMN if sharding is Sharding.COLUMN else next(s for s in weight_specs(SMALL) if s.sharding is sharding)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_folder_to_shards_and_back_is_bitwise(model_folder: Path, tp_size: int) -> None:
    folder = HfFolder(model_folder)
    architecture = read_architecture(model_folder)
    padded = architecture.padded_vocab_size(8, tp_size)
    seen = {}
    for spec in weight_specs(architecture):
        shards = [
            local_slice(spec, architecture, folder.fetch, tp_rank=r, tp_size=tp_size, padded_vocab_size=padded)
            for r in range(tp_size)
        ]
        expected = local_shape(spec, architecture, tp_size=tp_size, padded_vocab_size=padded)
        assert [tuple(shard.shape) for shard in shards] == [expected] * tp_size
        seen.update(merge(spec, architecture, shards, padded))
    assert sorted(seen) == folder.names()
    for name, tensor in seen.items():
        assert torch.equal(tensor, folder.fetch(name, (slice(None),) * tensor.dim())), name
        assert tensor.is_contiguous()


@given(
    tp_size=st.sampled_from([1, 2, 4]),
    groups_per_rank=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    kv_channels=st.integers(1, 4),
    hidden_size=st.integers(1, 5),
    ffn_per_rank=st.integers(1, 4),
    vocab_size=st.integers(1, 20),
    divisible_by=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_survives_the_round_trip(
    tp_size: int,
    groups_per_rank: int,
    heads_per_group: int,
    kv_channels: int,
    hidden_size: int,
    ffn_per_rank: int,
    vocab_size: int,
    divisible_by: int,
    dtype: torch.dtype,
) -> None:
    architecture = replace(
        SMALL,
        num_query_groups=groups_per_rank * tp_size,
        num_attention_heads=groups_per_rank * tp_size * heads_per_group,
        kv_channels=kv_channels,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_per_rank * tp_size,
        vocab_size=vocab_size,
    )
    padded = architecture.padded_vocab_size(divisible_by, tp_size)
    specs = weight_specs(architecture)
    source = Source(specs, dtype)
    for spec in specs:
        for name, tensor in merge(spec, architecture, cut_all(spec, architecture, source, tp_size, padded), padded):
            assert torch.equal(tensor, source.tensors[name]) and tensor.dtype == dtype


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("sharding", [Sharding.QKV, Sharding.QKV_BIAS])
def test_qkv_rows_are_grouped_by_query_group(sharding: Sharding, tp_size: int) -> None:
    spec = by_sharding(sharding)
    source = Source([spec])
    q, k, v = (source.tensors[name] for name in spec.hf_names)
    heads_per_group, width = 2, SMALL.kv_channels
    for rank, shard in enumerate(cut_all(spec, SMALL, source, tp_size, 16)):
        rows = []
        for group in range(rank * 4 // tp_size, (rank + 1) * 4 // tp_size):
            for head in range(group * heads_per_group, (group + 1) * heads_per_group):
                rows += [q[head * width + i] for i in range(width)]
            rows += [k[group * width + i] for i in range(width)]
            rows += [v[group * width + i] for i in range(width)]
        assert torch.equal(shard, torch.stack(rows))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_gate_comes_before_up_on_every_rank(tp_size: int) -> None:
    spec = by_sharding(Sharding.GATE_UP)
    source = Source([spec])
    gate, up = (source.tensors[name] for name in spec.hf_names)
    for rank, shard in enumerate(cut_all(spec, SMALL, source, tp_size, 16)):
        mine = range(rank * 8 // tp_size, (rank + 1) * 8 // tp_size)
        assert torch.equal(shard, torch.stack([gate[i] for i in mine] + [up[i] for i in mine]))


def test_row_column_and_replicated_cuts() -> None:
    row, replicated = by_sharding(Sharding.ROW), by_sharding(Sharding.REPLICATED)
    source = Source([row, replicated, COLUMN])
    whole = source.tensors[row.hf_names[0]]
    assert torch.equal(cut_all(row, SMALL, source, 4, 16)[2], whole[:, 8:12])
    assert torch.equal(cut_all(COLUMN, SMALL, source, 4, 16)[3], source.tensors["c"][6:8])
    assert torch.equal(merge(COLUMN, SMALL, cut_all(COLUMN, SMALL, source, 4, 16), 16)[0][1], source.tensors["c"])
    for shard in cut_all(replicated, SMALL, source, 4, 16):
        assert torch.equal(shard, source.tensors[replicated.hf_names[0]])


@pytest.mark.parametrize("padded", [16, 64])
def test_vocabulary_padding_is_zero_and_may_fill_whole_ranks(padded: int) -> None:
    spec = by_sharding(Sharding.VOCAB)
    source = Source([spec])
    shards = cut_all(spec, SMALL, source, 4, padded)
    assert torch.equal(torch.cat(shards)[:13], source.tensors[spec.hf_names[0]])
    assert torch.count_nonzero(torch.cat(shards)[13:]) == 0
    assert {len(shard) for shard in shards} == {padded // 4}


def test_one_shard_of_a_replicated_weight_is_enough() -> None:
    spec = by_sharding(Sharding.REPLICATED)
    assert merge(spec, SMALL, [torch.arange(6.0)], 16)[0][1].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("sharding", "change", "expected"),
    [
        (Sharding.QKV, {"num_query_groups": 2}, "4 does not divide num_key_value_heads 2"),
        (Sharding.QKV_BIAS, {"num_attention_heads": 6}, "4 does not divide num_attention_heads 6"),
        (Sharding.GATE_UP, {"ffn_hidden_size": 10}, "4 does not divide intermediate_size 10"),
        (
            Sharding.ROW,
            {"num_attention_heads": 3, "num_query_groups": 3},
            "4 does not divide columns of model.layers.0.self",
        ),
    ],
)
def test_sizes_that_cannot_be_cut(sharding: Sharding, change: dict[str, int], expected: str) -> None:
    architecture = replace(SMALL, **change)
    spec = next(s for s in weight_specs(architecture) if s.sharding is sharding)
    with pytest.raises(WeightsError, match=f"parallel.tensor_model_parallel_size: {expected}"):
        local_slice(spec, architecture, Source([spec]).fetch, tp_rank=0, tp_size=4, padded_vocab_size=16)


def test_column_rows_that_cannot_be_cut() -> None:
    with pytest.raises(WeightsError, match="3 does not divide rows of c 8"):
        local_shape(COLUMN, SMALL, tp_size=3, padded_vocab_size=16)


@pytest.mark.parametrize(("padded", "expected"), [(12, "12 is less than vocab_size 13"), (14, "padded_vocab_size 14")])
def test_impossible_vocabulary_padding(padded: int, expected: str) -> None:
    with pytest.raises(WeightsError, match=expected):
        local_shape(by_sharding(Sharding.VOCAB), SMALL, tp_size=4, padded_vocab_size=padded)


def test_merge_refuses_a_shard_of_another_shape() -> None:
    spec = by_sharding(Sharding.GATE_UP)
    shards = cut_all(spec, SMALL, Source([spec]), 2, 16)
    with pytest.raises(WeightsError, match=r"linear_fc1\.weight: shard 1 has shape \(7, 6\), expected \(8, 6\)"):
        merge(spec, SMALL, [shards[0], shards[1][:7]], 16)
