"""What every arrangement of vLLM shares: refusals, requests, versions and the order of answers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.common.engine_setup import engine_setup
from transformers import Qwen2Config

from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.config.schema import VllmSection
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.randomness import answer_key
from megatron_prime.rollout.vllm.trainer.base import Take, VllmEngine, Waiting, engine_options
from megatron_prime.rollout.vllm.wire.messages import EngineRequest, Finished

SAMPLING = SamplingParams(num_responses=2, temperature=1.0, top_p=1.0, max_response_tokens=4, seed=5)


class Echo(VllmEngine):
    """Answers with the prompt's first token and the low digit of the seed, in a random order."""

    asked: tuple[EngineRequest, ...] = ()
    sampling_problem: str | None = None
    weights_problems: tuple[str, ...] = ()

    def _sample(self, waiting: Waiting, take: Take) -> str | None:
        self.asked = tuple(waiting.values())
        for request in random.Random(1).sample(self.asked, len(self.asked)):
            take(
                Finished(
                    request_id=request.request_id,
                    token_ids=(request.prompt_token_ids[0], request.seed % 10),
                    logprobs=(-0.5, -0.25),
                    finish_reason="length",
                    weight_versions=(self.weight_version,),
                )
            )
        return self.sampling_problem

    def _prepare(self, weights) -> list[str]:
        return list(self.weights_problems)

    def _load(self, weights, version: int) -> str:
        return f"checksum of {version}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=23, max_position_embeddings=32)
    config.save_pretrained(tmp_path)
    return tmp_path


def make(folder: Path, **place: object) -> Echo:
    arguments = {"engine_index": 0, "num_engines": 1, "is_leader": True} | place
    return Echo(engine_setup(folder, VllmSection(max_model_len=24)), **arguments)  # pyright: ignore[reportArgumentType]


def make_prompts(count: int, length: int = 3) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{n}", text="", token_ids=(n,) * length, ground_truth="") for n in range(1, count + 1)]


def test_nothing_is_sampled_before_a_load_succeeds_or_after_one_failed(folder: Path) -> None:
    engine = make(folder)
    with pytest.raises(RolloutError, match="it has no weights; call load_weights first"):
        engine.generate(make_prompts(1), SAMPLING)
    assert engine.load_weights([], 7) == "checksum of 7" and engine.weight_version == 7  # pyright: ignore[reportArgumentType]
    engine.weights_problems = ("w: holds values that are not finite",)
    with pytest.raises(RolloutError, match="weights of version 8: w: holds values that are not finite"):
        engine.load_weights([], 8)  # pyright: ignore[reportArgumentType]
    assert engine.weight_version == -1
    with pytest.raises(RolloutError, match="it has no weights"):
        engine.generate(make_prompts(1), SAMPLING)


def test_prompts_that_do_not_fit_are_refused_before_the_engine_is_asked(folder: Path) -> None:
    engine = make(folder)
    engine.load_weights([], 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RolloutError, match="exceeds the engine's limit of 24"):
        engine.generate([*make_prompts(2), *make_prompts(1, length=21)], SAMPLING)
    assert engine.asked == ()


def test_answers_come_in_the_order_of_prompts_with_a_seed_of_their_own(folder: Path) -> None:
    engine = make(folder)
    engine.load_weights([], 3)  # pyright: ignore[reportArgumentType]
    prompts, heard = make_prompts(4), dict[tuple[int, int], Response]()
    groups = engine.generate(prompts, SAMPLING, lambda index, answer, found: heard.update({(index, answer): found}))
    expected = [
        [(n + 1, (answer_key(5, f"p{n + 1}", answer) & (2**63 - 1)) % 10) for answer in range(2)] for n in range(4)
    ]
    assert [[response.token_ids for response in group] for group in groups] == expected
    assert {response.weight_version for group in groups for response in group} == {3}
    assert heard == {(n, answer): groups[n][answer] for n in range(4) for answer in range(2)}


def test_engines_share_out_prompts_and_only_leaders_ask(folder: Path) -> None:
    asked = []
    for engine_index in range(2):
        engine = make(folder, engine_index=engine_index, num_engines=2)
        engine.load_weights([], 0)  # pyright: ignore[reportArgumentType]
        engine.generate(make_prompts(5), SAMPLING)
        asked.append([request.request_id for request in engine.asked])
    assert asked == [["0/0", "0/1", "2/0", "2/1", "4/0", "4/1"], ["1/0", "1/1", "3/0", "3/1"]]


def test_what_the_engine_says_went_wrong_is_raised(folder: Path) -> None:
    engine = make(folder)
    engine.load_weights([], 0)  # pyright: ignore[reportArgumentType]
    engine.sampling_problem = "vLLM engine 0 was lost"
    with pytest.raises(RolloutError, match="vLLM engine 0 was lost"):
        engine.generate(make_prompts(1), SAMPLING)


def test_options_say_what_auto_and_null_stand_for(folder: Path) -> None:
    setup = engine_setup(folder, VllmSection())
    options = engine_options(setup.folder, "float32", setup.section.vllm, setup.architecture)
    assert options.max_model_len == 32
    assert options.transfer == ("ipc" if torch.cuda.is_available() else "shared_memory")
    section = replace(setup.section.vllm, transfer="ipc", max_model_len=9)
    options = engine_options(setup.folder, "float32", section, setup.architecture)
    assert (options.max_model_len, options.transfer) == (9, "ipc")
