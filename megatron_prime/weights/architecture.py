"""What a Hugging Face `config.json` says of a model, checked, in Megatron's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_prime.errors import WeightsError

Family = Literal["qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe"]

_WITH_EXPERTS = ("qwen2_moe", "qwen3_moe")
_WITH_QKV_BIAS = ("qwen2", "qwen2_moe")
_WITH_QK_NORMS = ("qwen3", "qwen3_moe")
_PLAIN_ROPE_TYPES = ("default", None)
_LLAMA_ROTARY_BASE = 10000.0
_REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3RopeScaling:
    """How Llama 3.x stretches its rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayers:
    """The feed-forward part of every layer where it is a router with experts."""

    num_experts: int
    router_topk: int
    """Experts that a token goes to."""
    normalize_weights: bool
    """The weights of a token's experts sum to 1; else they are what the softmax over all experts gave them."""
    ffn_hidden_size: int
    """Of one expert."""
    shared_ffn_hidden_size: int | None
    """Of the gated expert that sees every token, where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArchitecture:
    """The shape of a decoder; names are Megatron's where Megatron has one."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of a feed-forward part without experts."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding, without padding."""
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: Llama3RopeScaling | None
    layernorm_epsilon: float
    tied_embeddings: bool
    """The output head is the embedding."""
    add_qkv_bias: bool
    qk_layernorm: bool
    hf_config: Mapping[str, Any] = field(compare=False, repr=False)
    """`config.json` as it was read."""
    experts: ExpertLayers | None = None
    """None for a dense model."""

    def padded_vocab_size(self, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int) -> int:
        """Rows of Megatron's embedding over all tensor-parallel ranks.

        Args:
            make_vocab_size_divisible_by: every rank's rows are a multiple of this.
            tensor_model_parallel_size: ranks that share the embedding.

        Returns:
            `vocab_size` rounded up to a multiple of the product of both.
        """
        multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


class _Keys:
    """Typed look-ups that collect problems; after a problem the placeholder they return is never used."""

    def __init__(self, raw: Mapping[str, Any], problems: list[str], prefix: str) -> None:
        self.raw = raw
        self.problems = problems
        self.prefix = prefix

    def problem(self, key: str, text: str) -> None:
        self.problems.append(f"{self.prefix}{key}: {text}")

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        return self._get(key, default, lambda v: type(v) is int and v > 0, "a positive integer", 1)

    def number(self, key: str, default: float = _REQUIRED) -> float:
        # `0 < v < inf` also refuses the NaN and Infinity that Python's JSON reader lets through.
        return float(
            self._get(
                key, default, lambda v: type(v) in (int, float) and 0 < v < float("inf"), "a positive number", 1.0
            )
        )

    def boolean(self, key: str, default: bool = _REQUIRED) -> bool:
        return self._get(key, default, lambda v: type(v) is bool, "true or false", False)

    def mapping(self, key: str) -> dict[str, Any] | None:
        return self._get(key, None, lambda v: isinstance(v, dict), "an object", {})

    def must_be(self, key: str, allowed: tuple[Any, ...], reason: str) -> None:
        """Refuses every present value outside `allowed`."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            self.problem(key, f"{value!r} is not supported: {reason}")

    def must_divide(self, divisor: str, key: str) -> None:
        """Refuses a remainder; silent where a value is no integer, for that is a problem of its own."""
        value, by = self.raw.get(key), self.raw.get(divisor)
        if type(value) is int and type(by) is int and by > 0 and value % by:
            self.problem(key, f"{value} is not a multiple of {divisor} {by}")

    def _get(self, key: str, default: Any, valid: Any, expected: str, placeholder: Any) -> Any:
        value = self.raw.get(key)
        if value is None:  # transformers writes null for "as the default says"
            if default is _REQUIRED:
                self.problem(key, f"missing; it must be {expected}")
                return placeholder
            return default
        if not valid(value):
            self.problem(key, f"{value!r} is not {expected}")
            return placeholder
        return value


def read_architecture(folder: str | Path) -> ModelArchitecture:
    """Reads and checks the `config.json` of a Qwen2, Qwen2.5, Qwen3, Qwen2-MoE, Qwen3-MoE or Llama 2/3 model.

    Args:
        folder: Hugging Face model folder.

    Returns:
        The architecture, with the raw configuration in `hf_config`.

    Raises:
        WeightsError: one line per problem, each naming the file and the key.
    """
    path = Path(folder) / "config.json"
    raw = _read_json_object(path)
    problems: list[str] = []
    keys = _Keys(raw, problems, prefix=f"{path}: ")
    family: Any = raw.get("model_type")
    if family not in get_args(Family):
        keys.problem("model_type", f"{family!r} is not supported; supported are {', '.join(get_args(Family))}")
        raise WeightsError("\n".join(problems))
    _refuse_unsupported(keys, family)
    num_attention_heads = keys.integer("num_attention_heads")
    hidden_size = keys.integer("hidden_size")
    rotary_base, rope_scaling = _rope(keys, family)
    architecture = ModelArchitecture(
        family=family,
        num_layers=keys.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=keys.integer("intermediate_size"),
        num_attention_heads=num_attention_heads,
        num_query_groups=_query_groups(keys, family, num_attention_heads),
        kv_channels=_head_dim(keys, family, hidden_size, num_attention_heads),
        vocab_size=keys.integer("vocab_size"),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        layernorm_epsilon=keys.number("rms_norm_eps"),
        tied_embeddings=keys.boolean("tie_word_embeddings", False),
        add_qkv_bias=family in _WITH_QKV_BIAS,
        qk_layernorm=family in _WITH_QK_NORMS,
        hf_config=raw,
        experts=_experts(keys, family) if family in _WITH_EXPERTS else None,
    )
    if problems:
        raise WeightsError("\n".join(problems))
    return architecture


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: not found; give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: must hold a JSON object, not {type(raw).__name__}")
    return raw


def _refuse_unsupported(keys: _Keys, family: Family) -> None:
    """Settings that would change the model's function and that the Megatron model has no counterpart for."""
    keys.must_be("hidden_act", ("silu",), "the feed-forward layers are SwiGLU (silu)")
    keys.must_be("use_sliding_window", (False,), "attention is full in every layer")
    layer_types = keys.raw.get("layer_types")
    if layer_types is not None and not isinstance(layer_types, list):
        keys.problem("layer_types", f"{layer_types!r} is not a list of the layers' kinds")
    elif layer_types is not None and any(kind != "full_attention" for kind in layer_types):
        keys.problem("layer_types", "only 'full_attention' is supported: attention is full in every layer")
    if keys.raw.get("quantization_config") is not None:
        keys.problem("quantization_config", "quantized weights are not supported; give the folder of the original")
    if family not in _WITH_QKV_BIAS:  # Qwen2 has its query, key and value bias always, whatever this key says
        keys.must_be("attention_bias", (False,), "it also puts a bias on the attention's output projection")
    keys.must_be("qkv_bias", (True,), "query, key and value projections have a bias")
    keys.must_be("mlp_bias", (False,), "the feed-forward layers have no bias")


def _experts(keys: _Keys, family: Family) -> ExpertLayers:
    keys.must_be("decoder_sparse_step", (1,), "every layer must have experts")
    keys.must_be("mlp_only_layers", ([],), "every layer must have experts")
    # transformers 5 writes `num_local_experts` for Qwen3, the published configurations have `num_experts`.
    num_experts = keys.integer("num_local_experts" if "num_local_experts" in keys.raw else "num_experts")
    router_topk = keys.integer("num_experts_per_tok")
    normalize_weights = keys.boolean("norm_topk_prob", False)
    if router_topk > num_experts:
        keys.problem("num_experts_per_tok", f"{router_topk} is more than the {num_experts} experts")
    elif router_topk == 1 and normalize_weights:
        keys.problem("norm_topk_prob", "with one expert per token every weight would be 1 and the router never learn")
    return ExpertLayers(
        num_experts=num_experts,
        router_topk=router_topk,
        normalize_weights=normalize_weights,
        ffn_hidden_size=keys.integer("moe_intermediate_size"),
        shared_ffn_hidden_size=keys.integer("shared_expert_intermediate_size") if family == "qwen2_moe" else None,
    )


def _query_groups(keys: _Keys, family: Family, num_attention_heads: int) -> int:
    # Llama models older than grouped-query attention do not have the key.
    keys.must_divide("num_key_value_heads", "num_attention_heads")
    return keys.integer("num_key_value_heads", num_attention_heads if family == "llama" else _REQUIRED)


def _head_dim(keys: _Keys, family: Family, hidden_size: int, num_attention_heads: int) -> int:
    if family == "qwen3":  # transformers takes 128 where the key is missing, not the quotient
        return keys.integer("head_dim")
    if keys.raw.get("head_dim") is None:
        keys.must_divide("num_attention_heads", "hidden_size")
    return keys.integer("head_dim", max(hidden_size // num_attention_heads, 1))


def _rope(keys: _Keys, family: Family) -> tuple[float, Llama3RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    new, old = keys.mapping("rope_parameters"), keys.mapping("rope_scaling")
    if new is not None and old is not None:
        keys.problem("rope_scaling", "set together with rope_parameters, which replaces it; keep one of them")
    section, raw = ("rope_scaling", old or {}) if new is None else ("rope_parameters", new)
    rope = _Keys(raw, keys.problems, prefix=f"{keys.prefix}{section}.")
    theta_in_section = "rope_theta" in raw or (new is not None and "rope_theta" not in keys.raw)
    # The first Llama 2 configurations have no base at all.
    default = _LLAMA_ROTARY_BASE if family == "llama" and new is None else _REQUIRED
    rotary_base = (rope if theta_in_section else keys).number("rope_theta", default)
    rope.must_be("partial_rotary_factor", (1, 1.0), "rotary embeddings cover the whole head")

    key = "rope_type" if "rope_type" in rope.raw else "type"
    rope_type = rope.raw.get(key)
    if rope_type in _PLAIN_ROPE_TYPES:
        return rotary_base, None
    if rope_type != "llama3" or family != "llama":
        rope.problem(key, f"{rope_type!r} is not supported; Llama may have 'llama3', every family none or 'default'")
        return rotary_base, None
    return rotary_base, Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )
