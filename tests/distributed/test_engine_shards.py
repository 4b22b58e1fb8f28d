"""The embedded engine on two gloo processes gives every rank what one process alone gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.embedded.engine import TransformersEngine

PARAMS = SamplingParams(num_responses=3, temperature=1.0, top_p=0.95, max_response_tokens=20, seed=4)


def _prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(
            prompt_id=f"p{i}",
            text="",
            token_ids=tuple(torch.randint(2, 131, (3 + 5 * i,), generator=generator).tolist()),
            ground_truth="",
        )
        for i in range(7)
    ]


def _generate(folder: Path) -> tuple[list[list[list[Response]]], str]:
    """Answers to 7, 1 and no prompts, and the error that a prompt of the other rank's share makes."""
    engine = TransformersEngine(
        folder,
        dtype=torch.float32,
        device="cpu",
        end_token_ids=(1,),
        decode=lambda token_ids: " ".join(map(str, token_ids)),
        max_batch_size=5,
    )
    reference = AutoModelForCausalLM.from_pretrained(folder)
    engine.load_weights(((name, parameter.detach()) for name, parameter in reference.named_parameters()), version=2)
    answers = [engine.generate(_prompts()[:count], PARAMS) for count in (7, 1, 0)]
    too_long = Prompt(prompt_id="long", text="", token_ids=(2,) * 120, ground_truth="")
    try:
        engine.generate([_prompts()[0], too_long], PARAMS)
    except RolloutError as error:
        return answers, str(error)
    return answers, "no error"


def _on_a_rank(folder: Path) -> Any:
    dist.init_process_group("gloo")
    try:
        return _generate(folder)
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(gloo_pool: Any, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "model")
    expected, expected_error = _generate(folder)
    assert "'long'" in expected_error
    assert [len(group) for group in expected[0]] == [3] * 7
    for answers, error in gloo_pool.run(2, _on_a_rank, folder):
        assert error == expected_error
        for groups, expected_groups in zip(answers, expected, strict=True):
            assert [[r.token_ids for r in g] for g in groups] == [[r.token_ids for r in g] for g in expected_groups]
            assert [[r.text for r in g] for g in groups] == [[r.text for r in g] for g in expected_groups]
            for response, other in zip(sum(groups, []), sum(expected_groups, []), strict=True):  # noqa: RUF017
                assert response.finish_reason == other.finish_reason
                assert response.weight_version == 2
                assert max(abs(a - b) for a, b in zip(response.logprobs, other.logprobs, strict=True)) < 1e-5
