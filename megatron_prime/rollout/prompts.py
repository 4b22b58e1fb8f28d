"""What every engine asks of prompts before it samples."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prime.batch import Prompt
from megatron_prime.errors import RolloutError


def check_prompts(prompts: Sequence[Prompt], max_response_tokens: int, *, max_length: int, vocab_size: int) -> None:
    """Raises a RolloutError with every prompt that does not fit the model.

    All ranks check all prompts: if one alone raised, the others would wait for it in a collective.

    Args:
        prompts: of the whole call.
        max_response_tokens: longest answer.
        max_length: prompt and answer together, in tokens.
        vocab_size: of the model.
    """
    problems: list[str] = []
    for prompt in prompts:
        length = len(prompt.token_ids)
        if length == 0:
            problems.append(f"prompt {prompt.prompt_id!r} has no tokens")
        elif length + max_response_tokens > max_length:
            problems.append(
                f"prompt {prompt.prompt_id!r} has {length} tokens; with rollout.max_response_tokens = "
                f"{max_response_tokens} that exceeds the engine's limit of {max_length} "
                "(the model's max_position_embeddings, or rollout.vllm.max_model_len)"
            )
        elif not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocab_size:
            problems.append(f"prompt {prompt.prompt_id!r} has a token outside the vocabulary of {vocab_size}")
    if problems:
        raise RolloutError("\n".join(problems))


def lack_of_room(what: str, prompt_tokens: int, max_tokens: int, limit: int) -> str | None:
    """Why `--max-tokens` of a command is more than a model has room for; None where it fits.

    Args:
        what: is asked, to begin the sentence with.
        prompt_tokens: of the longest prompt.
        max_tokens: of an answer.
        limit: the model's `max_position_embeddings`.
    """
    room = limit - prompt_tokens
    if max_tokens <= room:
        return None
    remedy = f"--max-tokens {room} fits" if room > 0 else "the prompt alone is too long"
    asked = f"answers of {max_tokens} tokens after a prompt of {prompt_tokens}"
    return f"{what}: {asked} exceed the model's {limit} positions; {remedy}"
