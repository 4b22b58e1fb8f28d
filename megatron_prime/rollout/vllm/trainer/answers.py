"""Between the trainer's prompts and answers and what a vLLM engine takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from megatron_prime import collectives
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.randomness import answer_key
from megatron_prime.rollout.vllm.wire.messages import EngineRequest, Finished


def make_request(
    index: int, answer: int, prompt: Prompt, sampling: SamplingParams, end_token_ids: Sequence[int]
) -> EngineRequest:
    """What an engine is asked for one answer of a prompt; the same for every engine and after every restart.

    Args:
        index: number of the prompt; it and `answer` come back with the answer (`request_key`).
        answer: which of the prompt's answers.
        prompt: to be answered.
        sampling: how to sample.
        end_token_ids: end every answer, besides the stop tokens of `sampling`.
    """
    return EngineRequest(
        request_id=f"{index}/{answer}",
        prompt_token_ids=prompt.token_ids,
        # vLLM's seeds are not negative.
        seed=answer_key(sampling.seed, prompt.prompt_id, answer) & (2**63 - 1),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_response_tokens,
        stop_token_ids=(*end_token_ids, *sampling.stop_token_ids),
    )


def request_key(request_id: str) -> tuple[int, int]:
    """Numbers of the prompt and of its answer."""
    index, answer = request_id.split("/")
    return int(index), int(answer)


def to_response(finished: Finished, decode: Callable[[Sequence[int]], str]) -> Response:
    """An engine's answer as the trainer takes it."""
    stopped = finished.finish_reason == "stop"
    return Response(
        text=decode(finished.token_ids[:-1] if stopped else finished.token_ids),
        token_ids=finished.token_ids,
        logprobs=finished.logprobs,
        finish_reason=finished.finish_reason,
        weight_version=finished.weight_versions[0],
        spans_versions=len(set(finished.weight_versions)) > 1,
    )


def raise_for(problems: Iterable[str | None]) -> None:
    """Raises on every rank what any of them met."""
    if found := [problem for problem in problems if problem is not None]:
        raise RolloutError("\n".join(found))


def raise_together(problems: Sequence[str], prefix: str = "") -> None:
    """Raises on every rank what each of them met, everything once; a collective of all ranks."""
    everyones = sorted({problem for found in collectives.all_gather(problems) for problem in found})
    raise_for(f"{prefix}{problem}" for problem in everyones)


def not_finite(names: Iterable[str]) -> list[str]:
    """What is wrong with tensors of these names that hold NaN or an infinity."""
    return [f"{name}: holds values that are not finite" for name in names]
