"""Answers of a model to questions, without a trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_prime.assembly.engines import loaded_engine
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.config.schema import RolloutSection, VllmSection
from megatron_prime.data.templates import complete_messages, render
from megatron_prime.data.tokenizer import encode, load_tokenizer
from megatron_prime.errors import ConfigError
from megatron_prime.rollout.prompts import lack_of_room
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.conversion import as_hf_folder


def generate(
    folder: str,
    questions: Sequence[str],
    *,
    ability: str,
    raw: bool,
    sampling: SamplingParams,
    engine: str = "transformers",
) -> list[list[Response]]:
    """Answers of a model to questions, in this process and without a trainer.

    Args:
        folder: Hugging Face folder with tokenizer, or a Megatron checkpoint that `to_megatron` made of one.
        questions: one prompt each.
        ability: ``math`` or ``code``: which of PRIME's suffixes the question gets.
        raw: take the questions as they are, without system prompt, suffix and chat template.
        sampling: how to sample.
        engine: which engine samples.
    """
    with as_hf_folder(folder) as readable:
        return _generate(readable, questions, ability=ability, raw=raw, sampling=sampling, engine=engine)


def _generate(
    folder: str,
    questions: Sequence[str],
    *,
    ability: str,
    raw: bool,
    sampling: SamplingParams,
    engine: str,
) -> list[list[Response]]:
    tokenizer = load_tokenizer(folder)
    prompts: list[Prompt] = []
    for number, question in enumerate(questions):
        message = {"role": "user", "content": question}
        kept = "none" if raw else "prime"
        messages = complete_messages([message], ability=ability, system_prompt=kept, task_suffix=not raw)
        text = render(tokenizer, messages, "raw" if raw else "chat")
        ids = encode(tokenizer, [text], special_tokens=raw)[0]
        prompts.append(Prompt(prompt_id=str(number), text=text, token_ids=ids, ground_truth="", ability=ability))
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    num_tokens, answer = len(longest.token_ids), sampling.max_response_tokens
    limit = read_architecture(folder).max_position_embeddings
    if lack := lack_of_room(f"question {int(longest.prompt_id) + 1}", num_tokens, answer, limit):
        raise ConfigError(lack)
    vllm = VllmSection(max_model_len=num_tokens + answer, max_num_seqs=64)
    section = RolloutSection(engine=engine, num_prompts=1, max_batch_size=64, vllm=vllm)
    with loaded_engine(folder, "float32", section, torch.get_num_threads()) as (loaded, _):
        return loaded.generate(prompts, sampling)
