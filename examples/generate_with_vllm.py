r"""PRIME's inference example: a chat prompt with PRIME's system prompt and suffix, answered by vLLM.

    python examples/generate_with_vllm.py runs/demo/hf $'12+5-3=?\n' --raw
    python examples/generate_with_vllm.py models/Eurus-2-7B-PRIME "What is the 10th prime?" --num-responses 4

Takes a Hugging Face folder, or a Megatron checkpoint of `megatron-prime convert`.
"""

from __future__ import annotations

import argparse

from megatron_prime.assembly.generate import generate
from megatron_prime.batch import SamplingParams


def main() -> None:
    """Samples answers and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("question")
    parser.add_argument("--raw", action="store_true", help="the question as it is, without PRIME's prompts")
    parser.add_argument("--num-responses", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    sampling = SamplingParams(
        num_responses=options.num_responses,
        temperature=0.7,
        top_p=1.0,
        max_response_tokens=options.max_tokens,
        seed=1,
    )
    (answers,) = generate(
        options.model, [options.question], ability="math", raw=options.raw, sampling=sampling, engine="vllm"
    )
    for answer in answers:
        mean = sum(answer.logprobs) / len(answer.logprobs)
        print(f"[{answer.finish_reason}, {len(answer.token_ids)} tokens, {mean:.2f} nats each] {answer.text}")


if __name__ == "__main__":
    main()
