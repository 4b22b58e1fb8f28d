"""`megatron-prime evaluate`: a finished model on benchmarks, or a configuration's model on its evaluation prompts."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_prime.commands.arguments import (
    ENGINE_HELP,
    Commands,
    add_command,
    add_configuration,
    at_least_one,
    engine,
    load_kind,
    probability,
    temperature,
)
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.config.single_process import single_process
from megatron_prime.errors import ConfigError
from megatron_prime.evaluation.options import EvaluationOptions


def add_parser(commands: Commands) -> None:
    text = "avg@k of a configuration's model.path on its evaluation prompts (JSON), or a model on published benchmarks"
    parser = add_command(commands, "evaluate", text, run)
    text = "YAML file; or, with --benchmarks, a Hugging Face folder or Megatron checkpoint"
    add_configuration(parser, text, metavar="CONFIG|MODEL")
    group = parser.add_argument_group(
        "for a model (docs/reference/evaluation.md)",
        "defaults are each benchmark's own protocol",
        argument_default=argparse.SUPPRESS,
    )
    group.add_argument("--benchmarks", type=_names, metavar="NAME,NAME", help="aime24, math500, gsm8k, humaneval, ...")
    group.add_argument("--data", help="folder with one folder per benchmark (default: data)")
    group.add_argument("--output", help="answers, results.json, results.txt (default: evaluations/MODEL)")
    group.add_argument("--engine", type=engine, help=ENGINE_HELP)
    group.add_argument("--tensor-parallel-size", type=at_least_one, help="GPUs of a vLLM engine (default: 1)")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32")
    group.add_argument("--num-samples", type=at_least_one, help="answers per problem")
    group.add_argument("--temperature", type=temperature, help="0 = greedy")
    group.add_argument("--top-p", type=probability)
    group.add_argument("--max-tokens", type=at_least_one, help="longest answer")
    group.add_argument("--num-problems", type=at_least_one, help="only the first ones")
    group.add_argument("--system-prompt", choices=["prime", "none"], help="default: prime")
    group.add_argument("--template", choices=["chat", "raw"], help="raw: no chat template (default: chat)")
    group.add_argument("--seed", type=int, help="default: 1")
    group.add_argument("--num-workers", type=at_least_one, help="processes that grade (default: one per core)")


def run(options: argparse.Namespace) -> int:
    """A folder is a model, a file a configuration."""
    given = {name: getattr(options, name) for name in EvaluationOptions.__slots__ if hasattr(options, name)}
    if Path(options.config).is_dir():
        return _evaluate_model(options, given)
    if "benchmarks" in given:
        raise ConfigError(f"{options.config}: no such folder; --benchmarks needs one with a model")
    if given:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{option}: goes with --benchmarks; a configuration takes KEY=VALUE")
    config = single_process(load_kind(options, PrimeConfig))
    from megatron_prime.assembly.evaluate import evaluate

    print(json.dumps(evaluate(config), indent=1))
    return 0


def _evaluate_model(options: argparse.Namespace, given: dict[str, Any]) -> int:
    if "benchmarks" not in given:
        raise ConfigError(f"{options.config}: a model needs --benchmarks NAME,NAME; without them name a YAML file")
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]}: --benchmarks takes a model and no configuration or overrides")
    from megatron_prime.assembly.engines import loaded_engine
    from megatron_prime.evaluation.benchmarks import evaluate_benchmarks
    from megatron_prime.observe.report import benchmark_table

    given.setdefault("output", str(Path("evaluations") / Path(os.path.normpath(options.config)).name))
    results = evaluate_benchmarks(EvaluationOptions(model=options.config, **given), loaded_engine)
    print(benchmark_table(results), end="")
    print(f"everything is in {given['output']}/")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
