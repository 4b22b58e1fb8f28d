"""`megatron-prime generate`: answers of a model to questions."""

from __future__ import annotations

import argparse
import json

from megatron_prime.commands.arguments import (
    ENGINE_HELP,
    Commands,
    add_command,
    at_least_one,
    engine,
    probability,
    temperature,
)


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "generate", "sample answers of a model; prints one JSON row each", run)
    parser.add_argument("model", help="Hugging Face folder, or Megatron checkpoint of `convert`")
    parser.add_argument("questions", nargs="+", help="questions, taken as they are")
    parser.add_argument("--ability", choices=["math", "code"], default="math", help="which of PRIME's suffixes")
    parser.add_argument("--raw", action="store_true", help="no system prompt, suffix or chat template")
    parser.add_argument("--max-tokens", type=at_least_one, default=1024)
    parser.add_argument("--num-responses", type=at_least_one, default=1)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-p", type=probability, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", type=engine, default="transformers", help=ENGINE_HELP)


def run(options: argparse.Namespace) -> int:
    from megatron_prime.assembly.generate import generate
    from megatron_prime.batch import SamplingParams

    sampling = SamplingParams(
        num_responses=options.num_responses,
        temperature=options.temperature,
        top_p=options.top_p,
        max_response_tokens=options.max_tokens,
        seed=options.seed,
    )
    answers = generate(
        options.model,
        options.questions,
        ability=options.ability,
        raw=options.raw,
        sampling=sampling,
        engine=options.engine,
    )
    for question, row in zip(options.questions, answers, strict=True):
        for answer in row:
            print(json.dumps({"prompt": question, "answer": answer.text, "finish_reason": answer.finish_reason}))
    return 0
