"""Loading weights into the engine, its states, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_engines import CONFIGS, TinyModel, make_prompts, spell

from megatron_prime.batch import SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import Engine
from megatron_prime.rollout.embedded.engine import TransformersEngine
from megatron_prime.weights.checksum import WeightChecksum

PARAMS = SamplingParams(num_responses=2, temperature=1.0, top_p=1.0, max_response_tokens=8, seed=3)
Tiny = Callable[[str], TinyModel]


@pytest.mark.parametrize("name", CONFIGS)
def test_checksum_is_that_of_the_stream_in_any_order(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    expected = WeightChecksum()
    for parameter_name, tensor in model.weights():
        expected.update(parameter_name, tensor)
    engine: Engine = model.engine()
    assert engine.weight_version == -1
    assert engine.load_weights(iter(model.weights()[::-1]), version=3) == expected.hexdigest()
    assert engine.weight_version == 3


def test_new_weights_replace_the_old_ones(tiny: Tiny) -> None:
    model = tiny("qwen3")
    engine = model.loaded_engine()
    prompts = make_prompts(4)
    before = engine.generate(prompts, PARAMS)
    checksum = engine.load_weights([(name, tensor * 0.5) for name, tensor in model.weights()], version=8)
    after = engine.generate(prompts, PARAMS)
    assert [r.logprobs for g in before for r in g] != [r.logprobs for g in after for r in g]
    assert {r.weight_version for g in after for r in g} == {8}
    assert engine.load_weights(model.weights(), version=7) != checksum
    assert engine.generate(prompts, PARAMS) == before


def test_tied_output_layer_may_be_sent_but_must_agree(tiny: Tiny) -> None:
    model = tiny("qwen2_tied")
    weights = dict(model.weights())
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    engine = model.engine()
    plain = engine.load_weights(weights.items(), version=1)
    assert engine.load_weights([("lm_head.weight", embedding), *weights.items()], version=2) == plain
    with pytest.raises(RolloutError, match=r"lm_head.weight: differs from the parameter"):
        engine.load_weights([*weights.items(), ("lm_head.weight", embedding + 1)], version=3)


def test_a_stream_may_reuse_its_buffers(tiny: Tiny) -> None:
    model = tiny("qwen2_tied")
    weights = dict(model.weights())
    expected = model.engine().load_weights(weights.items(), version=1)

    def reusing():
        for name, tensor in [("lm_head.weight", weights["model.embed_tokens.weight"]), *weights.items()]:
            buffer = tensor.clone()
            yield name, buffer
            buffer.zero_()

    assert model.engine().load_weights(reusing(), version=1) == expected


def test_untied_output_layer_is_required(tiny: Tiny) -> None:
    model = tiny("qwen2_untied")
    weights = [(name, tensor) for name, tensor in model.weights() if name != "lm_head.weight"]
    with pytest.raises(RolloutError, match=r"lm_head.weight: missing"):
        model.engine().load_weights(weights, version=1)


def test_all_problems_of_a_stream_are_listed_and_the_engine_stops(tiny: Tiny) -> None:
    model = tiny("llama")
    engine = model.loaded_engine()
    weights = dict(model.weights())
    norm = weights.pop("model.norm.weight")
    stream = [
        *weights.items(),
        ("model.layers.0.mlp.up_proj.weight", weights["model.layers.0.mlp.up_proj.weight"]),
        ("model.layers.9.mlp.up_proj.weight", norm),
    ]
    stream[0] = (stream[0][0], stream[0][1][:-1])
    taken: list[str] = []

    def watched():
        for name, tensor in stream:
            taken.append(name)
            yield name, tensor

    with pytest.raises(RolloutError) as caught:
        engine.load_weights(watched(), version=9)
    assert len(taken) == len(stream), "a stream may be a collective and must be read to its end"
    text = str(caught.value)
    assert len(text.splitlines()) == 4
    assert "model.embed_tokens.weight: received [22, 32], the model has [23, 32]" in text
    assert "model.layers.0.mlp.up_proj.weight: received more than once" in text
    assert "model.layers.9.mlp.up_proj.weight: the model has no such parameter" in text
    assert "model.norm.weight: missing" in text
    assert engine.weight_version == -1
    with pytest.raises(RolloutError, match="version 9 failed"):
        engine.generate(make_prompts(1), PARAMS)
    engine.load_weights(model.weights(), version=10)
    assert engine.generate(make_prompts(1), PARAMS)[0][0].weight_version == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny: Tiny, value: float) -> None:
    model = tiny("qwen3")
    weights = {name: tensor.clone() for name, tensor in model.weights()}
    weights["model.layers.1.self_attn.q_norm.weight"][3] = value
    with pytest.raises(RolloutError, match=r"layers.1.self_attn.q_norm.weight: holds values that are not finite"):
        model.engine().load_weights(weights.items(), version=1)


def test_a_stream_that_breaks_leaves_the_engine_unusable(tiny: Tiny) -> None:
    model = tiny("llama")
    engine = model.loaded_engine()

    def broken():
        yield from model.weights()[:3]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        engine.load_weights(broken(), version=8)
    with pytest.raises(RolloutError, match="cannot generate"):
        engine.generate(make_prompts(1), PARAMS)


def test_weights_that_did_not_arrive_are_noticed(tiny: Tiny) -> None:
    model = tiny("llama")
    engine = model.engine()
    assert engine._model is not None
    first, second = (engine._model.get_parameter(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up"))
    # Two parameters in one memory: the second to be loaded overwrites the first.
    second.data = first.data
    with pytest.raises(RolloutError, match="the engine holds"):
        engine.load_weights(model.weights(), version=1)
    with pytest.raises(RolloutError, match="cannot generate"):
        engine.generate(make_prompts(1), PARAMS)


def test_refuses_to_generate_without_weights_asleep_and_closed(tiny: Tiny) -> None:
    model = tiny("qwen2_tied")
    engine = model.engine()
    with pytest.raises(RolloutError, match="no weights"):
        engine.generate(make_prompts(1), PARAMS)
    engine.load_weights(model.weights(), version=1)
    before = engine.generate(make_prompts(2), PARAMS)
    engine.sleep()
    with pytest.raises(RolloutError, match="wake"):
        engine.generate(make_prompts(2), PARAMS)
    engine.wake()
    assert engine.generate(make_prompts(2), PARAMS) == before
    engine.close()
    for call in (lambda: engine.generate(make_prompts(1), PARAMS), lambda: engine.load_weights([], version=2)):
        with pytest.raises(RolloutError, match="closed"):
            call()


def test_bfloat16_weights_arrive_bit_by_bit(tiny: Tiny) -> None:
    model = tiny("qwen3")
    weights = [(name, tensor.bfloat16()) for name, tensor in model.weights()]
    expected = WeightChecksum()
    for name, tensor in weights:
        expected.update(name, tensor)
    engine = model.engine(dtype=torch.bfloat16)
    assert engine.load_weights(weights, version=1) == expected.hexdigest()
    assert all(r.logprobs for g in engine.generate(make_prompts(5), PARAMS) for r in g)


def test_global_generator_is_left_alone(tiny: Tiny) -> None:
    model = tiny("qwen2_untied")
    state = torch.get_rng_state()
    engine = model.loaded_engine()
    first = engine.generate(make_prompts(3), PARAMS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert engine.generate(make_prompts(3), PARAMS) == first


def _engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(
        folder, dtype=torch.float32, device="cpu", end_token_ids=(1,), decode=spell, max_batch_size=4
    )


def test_unusable_folders(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"config.json: not found"):
        _engine(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(RolloutError, match=r"config.json: transformers cannot build"):
        _engine(tmp_path)
    shutil.copytree(tiny("qwen2_tied").folder, tmp_path / "sliding")
    config = json.loads((tmp_path / "sliding" / "config.json").read_text())
    config |= {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    (tmp_path / "sliding" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RolloutError, match="use_sliding_window"):
        _engine(tmp_path / "sliding")
