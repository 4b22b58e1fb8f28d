"""Our attention against plain float64 attention, our rotary frequencies against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.mcore.cpu import megatron_platform, on_megatron_platform
from megatron_prime.mcore.packing import TokenRows, build_micro_batch
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture

with megatron_platform():
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_prime.mcore.layers import (
        PositionRotaryEmbedding,
        RMSNorm,
        SdpaAttention,
        rotary_inverse_frequencies,
    )
    from megatron_prime.mcore.model import packed_parameters

HEADS, GROUPS, DIM = 4, 2, 8
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
LENGTHS = {"unequal": (5, 1, 7, 3), "equal": (4, 4, 4), "one": (6,), "long last": (1, 2, 9)}


@on_megatron_platform
def layer_config() -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)


def attention(softmax_scale: float | None = None) -> SdpaAttention:
    return SdpaAttention(layer_config(), 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def slow_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence, head by head and token by token: [s, heads, dim] to [s, heads * dim]."""
    heads = []
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        tokens = []
        for i in range(query.shape[0]):
            weights = ((key[: i + 1, group] @ query[i, head]) * scale).softmax(0)
            tokens.append(weights @ value[: i + 1, group])
        heads.append(torch.stack(tokens))
    return torch.cat(heads, dim=-1)


def random_inputs(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(num_tokens, heads, DIM, dtype=dtype, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_attention_sees_only_its_own_sequence(lengths, dtype, scale) -> None:
    rows = TokenRows(
        prompt_token_ids=tuple((1,) * length for length in lengths),
        response_ids=torch.ones(len(lengths), 1, dtype=torch.int64),
        mask=torch.ones(len(lengths), 1, dtype=torch.bool),
    )
    micro = build_micro_batch(rows, range(len(lengths)), packed=True, multiple_of=1)
    assert micro.lengths == lengths
    inputs = random_inputs(sum(lengths), dtype)
    packed = packed_parameters(micro, transformer_engine=False, device=torch.device("cpu"))
    output = attention(scale)(*inputs, None, packed_seq_params=packed)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    pieces = zip(*(x.split(lengths) for x in wide), strict=True)
    expected = torch.cat([slow_attention(*piece, scale or DIM**-0.5) for piece in pieces])
    assert output.shape == (sum(lengths), HEADS * DIM)
    assert (output - expected).abs().max() < TOLERANCES[dtype]
    upstream = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad(output, inputs, upstream.to(dtype))
    wanted = torch.autograd.grad(expected, wide, upstream)
    for actual, right in zip(found, wanted, strict=True):
        assert (actual - right).abs().max() < TOLERANCES[dtype]


def test_padded_attention() -> None:
    inputs = [x.detach().unflatten(0, (6, 2)) for x in random_inputs(12, torch.float64)]
    output = attention()(*inputs, None)
    assert output.shape == (6, 2, HEADS * DIM)
    for line in range(2):
        expected = slow_attention(*(x[:, line] for x in inputs), DIM**-0.5)
        assert (output[:, line] - expected).abs().max() < 1e-12


LLAMA_31_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LLAMA_32_1B = LLAMA_31_8B | {
    "hidden_size": 2048,
    "head_dim": 64,
    "rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": 32.0},
}
LLAMA_2_7B = {k: v for k, v in LLAMA_31_8B.items() if k not in ("rope_theta", "rope_scaling")} | {
    "max_position_embeddings": 4096
}
CONFIGS = {"llama-3.1-8b": LLAMA_31_8B, "llama-3.2-1b": LLAMA_32_1B, "llama-2-7b": LLAMA_2_7B}


def architecture_of(folder: Path, config: dict[str, Any]) -> ModelArchitecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_frequencies_are_transformers_own(name: str, tmp_path: Path) -> None:
    ours = rotary_inverse_frequencies(architecture_of(tmp_path, CONFIGS[name]))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**CONFIGS[name]))
    assert theirs.rope_type == ("llama3" if "rope_scaling" in CONFIGS[name] else "default")
    assert ours.dtype is torch.float32
    assert torch.equal(ours, theirs.inv_freq)


def test_llama3_scaling_by_its_definition(tmp_path: Path) -> None:
    ours = rotary_inverse_frequencies(architecture_of(tmp_path, LLAMA_31_8B)).double()
    plain = [500000.0 ** (-2 * i / 128) for i in range(64)]
    kinds = set()
    for found, frequency in zip(ours.tolist(), plain, strict=True):
        turns = 8192 * frequency / (2 * torch.pi)  # of this frequency in the original context
        if turns > 4.0:
            kinds.add("kept")
            assert found == pytest.approx(frequency, rel=1e-6)
        elif turns < 1.0:
            kinds.add("stretched")
            assert found == pytest.approx(frequency / 8, rel=1e-6)
        else:
            kinds.add("blended")
            share = (turns - 1.0) / 3.0
            assert found == pytest.approx((1 - share) * frequency / 8 + share * frequency, rel=1e-5)
    assert kinds == {"kept", "stretched", "blended"}


@pytest.mark.parametrize("packed", [True, False])
def test_angles_follow_the_position_ids(packed: bool) -> None:
    embedding = PositionRotaryEmbedding(torch.tensor([1.0, 0.25]))
    embedding.set_positions(torch.tensor([[0, 1, 2, 0, 1]]), packed)
    angles = embedding(max_seq_len=99)
    assert angles.shape == ((5, 1, 4) if packed else (5, 1, 1, 4))
    assert embedding.get_rotary_seq_len() == 5
    expected = [[p, p / 4, p, p / 4] for p in (0, 1, 2, 0, 1)]
    assert angles.reshape(5, 4).tolist() == expected
    assert not list(embedding.state_dict())  # frequencies follow from the configuration


def test_a_bfloat16_model_turns_by_float32_angles(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    architecture = architecture_of(tmp_path, LLAMA_31_8B | small | {"num_attention_heads": 2, "num_key_value_heads": 1})
    with parallel_layout(ParallelSection(), seed=1) as layout:
        setup = RoleSetup(
            architecture=architecture,
            model=ModelSection(path=str(tmp_path), dtype="bfloat16"),
            parallel=ParallelSection(),
            micro_batch=MicroBatchSection(micro_batch_size=1),
            layout=layout,
        )
        role = ModelRole(setup)
    assert {parameter.dtype for parameter in role.modules[0].parameters()} == {torch.bfloat16}
    embedding = role.chunks[0].rotary_pos_emb
    assert isinstance(embedding, PositionRotaryEmbedding)
    assert embedding.inverse_frequencies.dtype is torch.float32
    positions = torch.arange(2001, 131072, 997)
    embedding.set_positions(positions[None], packed=True)
    angles = embedding(max_seq_len=len(positions))
    assert angles.dtype is torch.float32
    expected = torch.outer(positions.double(), rotary_inverse_frequencies(architecture).double()).tile(2)
    assert ((angles[:, 0] - expected).abs() <= expected * 2.0**-24).all()


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norm_says_whether_its_gradient_is_shared_out(sequence_parallel: bool) -> None:
    config = layer_config()
    config.sequence_parallel = sequence_parallel
    norm = RMSNorm(config, 8, eps=1e-5)
    assert norm.weight.sequence_parallel is sequence_parallel
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    rms = (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (norm(x) - x.double() / rms).abs().max() < 1e-6
