"""What the commands take."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_prime.commands import launch as command
from megatron_prime.commands.argument_types import above_zero, at_least_one, engine, port, probability, temperature
from megatron_prime.planner.hardware import PROFILES

_ENGINE_HELP = "transformers (default), vllm, or package.module:function of your own"


def build_parser(functions: Mapping[str, Callable[..., int]]) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        functions: what each command calls, by its name.
    """
    parser = argparse.ArgumentParser(prog="megatron-prime", description="PRIME reinforcement learning on Megatron-Core")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    overrides = {"nargs": "*", "metavar": "KEY=VALUE", "help": "override a key of the configuration, a.b=c"}

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=functions[name], name=name)
        return sub

    demo = add("demo", "the whole story in minutes on a CPU: SFT, then PRIME, in runs/demo/")
    demo.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="run.seed=N, rollout.engine=vllm")
    for name, text in (
        ("train", "train by PRIME"),
        ("sft", "make the starting model by supervised fine-tuning"),
        ("check", "resolve and validate a configuration and print the plan; starts nothing"),
    ):
        sub = add(name, text)
        sub.add_argument("config", help="YAML file")
        sub.add_argument("overrides", **overrides)  # type: ignore[arg-type]
        if name == "check":
            text = "plan for another machine: no weights or data files, of model.path only config.json"
            sub.add_argument("--shapes-only", action="store_true", help=text)
            sub.add_argument("--hardware", choices=sorted(PROFILES), help="default: h100, for float32 models cpu")
            sub.add_argument("--gpus", metavar="NxMGB", help="search layouts, e.g. 8x80GB, or 4x8x80GB for 4 nodes")
            text = "expected length of answers (default: a third of the limit)"
            sub.add_argument("--mean-response-tokens", type=at_least_one, help=text)
    serve = add("serve", "a vLLM server for runs with rollout.vllm.servers; it gets its weights from them")
    serve.add_argument("config", help="YAML file of the run")
    serve.add_argument("overrides", **overrides)  # type: ignore[arg-type]
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this host only)")
    serve.add_argument("--port", type=port, default=8000)
    command.add_arguments(add("launch", "start a run here, on Slurm or with NeMo-Run; watch and end jobs"))
    replay = add("replay", "run an update again that was not finite, response by response")
    replay.add_argument("file", type=Path, help="runs/NAME/failures/step_N_ROLE.pt")
    text = "newest checkpoint before the update, if any (default), or the run's starting model"
    replay.add_argument("--weights", choices=["checkpoint", "start"], default="checkpoint", help=text)
    text = "avg@k of a configuration's model.path on its evaluation prompts (JSON), or a model on published benchmarks"
    _add_evaluate(add("evaluate", text), overrides)
    _add_generate(add("generate", "sample answers of a model; prints one JSON row each"))
    _add_prepare(add("prepare", "clean data sets for training: PRIME's steps that need no model"))
    _add_verify(add("verify", "grade a file of answers, math or code"))
    _add_convert(add("convert", "Hugging Face folder <-> Megatron distributed checkpoint"))
    return parser


def _add_evaluate(parser: argparse.ArgumentParser, overrides: dict[str, Any]) -> None:
    parser.add_argument("config", help="YAML file; with --benchmarks a Hugging Face folder or Megatron checkpoint")
    parser.add_argument("overrides", **overrides)
    group = parser.add_argument_group(
        "benchmarks (docs/reference/evaluation.md)", "defaults are each benchmark's own protocol"
    )
    group.add_argument("--benchmarks", metavar="NAME,NAME", help="aime24, math500, gsm8k, humaneval, ...")
    group.add_argument("--data", default="data", help="folder with one folder per benchmark (default: data)")
    group.add_argument("--output", help="answers, results.json, results.txt (default: evaluations/MODEL)")
    group.add_argument("--engine", type=engine, default="transformers", help=_ENGINE_HELP)
    group.add_argument("--tensor-parallel-size", type=at_least_one, default=1, help="GPUs of a vLLM engine")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    group.add_argument("--num-samples", type=at_least_one, help="answers per problem")
    group.add_argument("--temperature", type=temperature, help="0 = greedy")
    group.add_argument("--top-p", type=probability)
    group.add_argument("--max-tokens", type=at_least_one, help="longest answer")
    group.add_argument("--num-problems", type=at_least_one, help="only the first ones")
    group.add_argument("--system-prompt", choices=["prime", "none"], default="prime")
    group.add_argument("--template", choices=["chat", "raw"], default="chat", help="raw: no chat template")
    group.add_argument("--seed", type=int, default=1)
    group.add_argument("--num-workers", type=at_least_one, default=os.cpu_count() or 1, help="processes that grade")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    text = ".jsonl, .jsonl.gz, .json, .parquet or hf:NAME[:CONFIG]:SPLIT"
    parser.add_argument("sources", nargs="+", metavar="in", help=text)
    parser.add_argument("output", metavar="out", help="new .jsonl or .parquet file; the report lies beside it")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="leave out what is in these benchmarks")
    text = "open: ask without the choices where a rule can; drop: leave such questions out (default: open)"
    parser.add_argument("--multiple-choice", choices=["open", "drop"], default="open", help=text)
    text = "share of common three-word runs that makes two problems the same; above 1: none (default: 0.8)"
    parser.add_argument("--similarity", type=above_zero, default=0.8, help=text)
    text = "reference programs: run those there are, require one, or ignore them (default: run)"
    parser.add_argument("--references", choices=["run", "require", "ignore"], default="run", help=text)
    parser.add_argument("--split", default="train", help="name in extra_info (default: train)")
    parser.add_argument("--num-workers", type=at_least_one, default=os.cpu_count() or 1, help="run programs at once")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, or Megatron checkpoint of `convert`")
    parser.add_argument("questions", nargs="+", help="questions, taken as they are")
    parser.add_argument("--ability", choices=["math", "code"], default="math", help="which of PRIME's suffixes")
    parser.add_argument("--raw", action="store_true", help="no system prompt, suffix or chat template")
    parser.add_argument("--max-tokens", type=at_least_one, default=1024)
    parser.add_argument("--num-responses", type=at_least_one, default=1)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-p", type=probability, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", type=engine, default="transformers", help=_ENGINE_HELP)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    text = "JSONL: response, ground_truth, ability (math, code), optionally data_source, extra_info"
    parser.add_argument("source", metavar="IN.jsonl", help=text)
    text = "the same rows with status, reward and seconds; goes on where an earlier call has stopped"
    parser.add_argument("target", metavar="OUT.jsonl", help=text)
    parser.add_argument("overrides", nargs="*", metavar="verifier.KEY=VALUE", help="docs/reference/configuration.md")
    parser.add_argument("--config", help="YAML file whose section `verifier` says how to grade")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=["to-megatron", "to-hf"])
    parser.add_argument("source", type=Path, help="Hugging Face folder, or Megatron checkpoint")
    parser.add_argument("target", type=Path, help="new folder; appears when it is complete")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the source is stored")
    text = "to-hf: Hugging Face folder with config.json and tokenizer (default: kept copy)"
    parser.add_argument("--like", type=Path, help=text)
    text = "to-megatron: cut files for this layout (default: 1); any other can read them too"
    parser.add_argument("--tensor-model-parallel-size", type=at_least_one, default=1, help=text)
    parser.add_argument("--pipeline-model-parallel-size", type=at_least_one, default=1, help="the same")
    text = "read everything back and compare every bit, and log-probs of a few prompts with transformers'"
    parser.add_argument("--verify", action="store_true", help=text)
    text = "print files and peak memory; needs no weights, only config.json of the source (to-hf: of --like)"
    parser.add_argument("--dry-run", action="store_true", help=text)
