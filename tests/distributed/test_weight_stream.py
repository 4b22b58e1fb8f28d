"""The weight stream over gloo: every layout of up to four processes, in one spawn."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from megatron_prime.errors import WeightsError
from megatron_prime.weights.architecture import ModelArchitecture
from megatron_prime.weights.checksum import WeightChecksum
from megatron_prime.weights.families import WeightSpec, weight_specs
from megatron_prime.weights.sharding import local_slice
from megatron_prime.weights.stream import ParallelGroups, export_stream

WORLD_SIZE = 4
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
"""(tensor, pipeline) parallel sizes; what is left of the world are data-parallel copies."""
UNTIED = ModelArchitecture(
    family="qwen2",
    num_layers=4,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=2,
    vocab_size=37,
    max_position_embeddings=8,
    rotary_base=1e4,
    rope_scaling=None,
    layernorm_epsilon=1e-5,
    tied_embeddings=False,
    add_qkv_bias=True,
    qk_layernorm=True,
    hf_config={},
)
TIED = replace(UNTIED, tied_embeddings=True)
EMBEDDING = "embedding.word_embeddings.weight"


def reference(architecture: ModelArchitecture, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole model under Hugging Face names, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for spec in weight_specs(architecture)
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }


def owns(spec: WeightSpec, architecture: ModelArchitecture, stage: int, num_stages: int) -> bool:
    if spec.stage == "layer":
        assert spec.layer is not None
        return spec.layer * num_stages // architecture.num_layers == stage
    return stage == (0 if spec.stage == "embedding" else num_stages - 1)


def local_weights(
    architecture: ModelArchitecture, weights: dict[str, Tensor], groups: ParallelGroups
) -> dict[str, Tensor]:
    """This rank's shards; a last stage with a tied head has its own copy of the embedding, as in Megatron."""
    local = {}
    for spec in weight_specs(architecture):
        shard = local_slice(
            spec,
            architecture,
            lambda name, slices: weights[name][slices],
            tp_rank=groups.tp_rank,
            tp_size=groups.tp_size,
            padded_vocab_size=architecture.padded_vocab_size(8, groups.tp_size),
        )
        if owns(spec, architecture, groups.pp_rank, groups.pp_size):
            local[spec.megatron_name] = shard
        elif spec.megatron_name == EMBEDDING and architecture.tied_embeddings and groups.pp_rank == groups.pp_size - 1:
            local[EMBEDDING] = torch.full_like(shard, torch.nan)  # must not be the one that is exported
    return local


def my_group(rank_lists: list[list[int]]) -> dist.ProcessGroup | None:
    """The group that this rank is in; None for a group of one, as the API allows."""
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if isinstance(group, dist.ProcessGroup) and dist.get_rank() in ranks:
            mine = group
    return mine


def make_groups(tp_size: int, pp_size: int) -> ParallelGroups:
    """Megatron's order of ranks: tensor, then data, then pipeline parallel."""
    rank = dist.get_rank()
    stride = WORLD_SIZE // pp_size
    tp_groups = [list(range(start, start + tp_size)) for start in range(0, WORLD_SIZE, tp_size)]
    pp_groups = [list(range(start, WORLD_SIZE, stride)) for start in range(stride)]
    return ParallelGroups(
        tp_group=my_group(tp_groups),
        pp_group=my_group(pp_groups),
        tp_rank=rank % tp_size,
        tp_size=tp_size,
        pp_rank=rank // stride,
        pp_size=pp_size,
    )


def check_stream(
    architecture: ModelArchitecture, groups: ParallelGroups, dtype: torch.dtype, wire_dtype: torch.dtype | None
) -> None:
    weights = reference(architecture, dtype)
    local = local_weights(architecture, weights, groups)
    checksum, expected = WeightChecksum(), WeightChecksum()
    names = []
    for name, tensor in export_stream(weight_specs(architecture), architecture, local, groups, dtype=wire_dtype):
        checksum.update(name, tensor)
        names.append(name)
        assert tensor.dtype == (wire_dtype or dtype), name
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
        expected.update(name, weights[name].to(tensor.dtype))
    assert names == list(weights)
    assert checksum.hexdigest() == expected.hexdigest()


def check_errors_reach_every_rank(groups: ParallelGroups) -> None:
    """One rank's mistake is every rank's error, with the same text; nobody waits for the others for ever."""
    specs = weight_specs(UNTIED)
    last = dist.get_rank() == WORLD_SIZE - 1
    local = local_weights(UNTIED, reference(UNTIED, torch.float32), groups)
    if last:
        del local["output_layer.weight"]
    with pytest.raises(WeightsError, match="stage 1: its ranks differ") as caught:
        list(export_stream(specs, UNTIED, local, groups))
    texts: list[str] = [""] * WORLD_SIZE
    dist.all_gather_object(texts, str(caught.value))
    assert len(set(texts)) == 1

    if groups.pp_rank == 1:
        local.pop("output_layer.weight", None)
        local["decoder.layers.4.input_layernorm.weight"] = torch.zeros(12)
    with pytest.raises(WeightsError) as caught:
        list(export_stream(specs, UNTIED, local, groups))
    assert str(caught.value).splitlines() == [
        "decoder.layers.4.input_layernorm.weight: not a weight of this qwen2 architecture",
        "output_layer.weight: no rank has it",
    ]


def run_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    for tp_size, pp_size in LAYOUTS:
        groups = make_groups(tp_size, pp_size)
        for architecture in (UNTIED, TIED):
            check_stream(architecture, groups, torch.float32, None)
            check_stream(architecture, groups, torch.bfloat16, None)
            check_stream(architecture, groups, torch.float32, torch.bfloat16)
        if (tp_size, pp_size) == (2, 2):
            check_errors_reach_every_rank(groups)
    dist.barrier()
    dist.destroy_process_group()


def test_stream_is_the_same_on_every_rank_of_every_layout(tmp_path: Path) -> None:
    spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD_SIZE)
