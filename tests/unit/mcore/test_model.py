"""Choices of a model's construction that only GPUs make, or that whole models on a CPU cannot tell apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.mcore.cpu import megatron_platform, on_megatron_platform
from megatron_prime.mcore.packing import TokenRows, build_micro_batch
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import ExpertLayers, ModelArchitecture

with megatron_platform():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_prime.mcore.model import packed_parameters, transformer_config

ARCHITECTURE = ModelArchitecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=128,
    vocab_size=100,
    max_position_embeddings=128,
    rotary_base=10000.0,
    layernorm_epsilon=1e-6,
    add_qkv_bias=False,
    qk_layernorm=False,
    tied_embeddings=False,
    rope_scaling=None,
    hf_config={},
)
EXPERTS = ExpertLayers(
    num_experts=4, router_topk=2, normalize_weights=True, ffn_hidden_size=32, shared_ffn_hidden_size=48
)


@on_megatron_platform
def config_of(model: ModelSection) -> TransformerConfig:
    return transformer_config(ARCHITECTURE, model, ParallelSection(), transformer_engine=False)


@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_fp8_scales_need_no_history_and_no_other_rank(fp8) -> None:
    config = config_of(ModelSection(path="", dtype="bfloat16", fp8=fp8))
    assert (config.fp8, config.fp8_recipe) == (fp8, "tensorwise")


@pytest.mark.parametrize("cuda", [False, True])
def test_swiglu_is_fused_on_gpus(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert config_of(ModelSection(path="")).bias_activation_fusion == cuda


def logprobs_and_gradients(role: ModelRole, rows: TokenRows) -> tuple[list[torch.Tensor], int]:
    """Of one forward and backward pass, and how many bytes autograd kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    (micro_batch,) = role._micro_batches(rows, range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = role._forward(role.chunks[0], micro_batch)
    parameters = [p for p in role.chunks[0].parameters() if p.requires_grad]
    return [logprobs, *torch.autograd.grad(logprobs.sum(), parameters)], sum(kept.values())


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
def test_the_fused_swiglu_computes_the_same_and_keeps_less(experts: ExpertLayers | None) -> None:
    architecture = replace(ARCHITECTURE, experts=experts, family="qwen2_moe" if experts else "llama")
    examples = [SftExample(prompt_token_ids=(1, 2), response_token_ids=tuple(range(3, 3 + n))) for n in (5, 9, 12)]
    rows = TokenRows.from_examples(examples)
    with parallel_layout(ParallelSection(), seed=1) as layout, megatron_platform():
        setup = RoleSetup(
            architecture=architecture,
            model=ModelSection(path=""),
            parallel=ParallelSection(),
            micro_batch=MicroBatchSection(micro_batch_size=3),
            layout=layout,
        )
        role = ModelRole(setup)
        plain, plain_bytes = logprobs_and_gradients(role, rows)
        for module in role.chunks[0].modules():
            config: Any = getattr(module, "config", None)
            if config is not None:
                config.bias_activation_fusion = True
        fused, fused_bytes = logprobs_and_gradients(role, rows)
    for found, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert fused_bytes < plain_bytes
    if experts is None:
        # Two tensors of the feed-forward width less in each layer, as plans count.
        num_tokens = sum(rows.input_lengths())
        assert plain_bytes - fused_bytes == 2 * 4 * num_tokens * architecture.ffn_hidden_size * architecture.num_layers


@pytest.mark.parametrize(("longest", "bound"), [(3, 1024), (1024, 1024), (1025, 2048)])
def test_transformer_engine_hears_of_few_different_lengths(longest: int, bound: int) -> None:
    lengths = (2, longest)
    rows = TokenRows.from_examples(
        [SftExample(prompt_token_ids=(1,), response_token_ids=(2,) * length) for length in lengths]
    )
    micro_batch = build_micro_batch(rows, [0, 1], packed=True, multiple_of=1)
    packed = packed_parameters(micro_batch, transformer_engine=True, device=torch.device("cpu"))
    assert packed is not None
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (bound, bound)
    assert packed.cu_seqlens_q is not None
    assert packed.cu_seqlens_q.tolist() == [0, 2, 2 + longest]
