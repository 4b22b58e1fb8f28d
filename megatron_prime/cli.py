"""The command line: parse, load the configuration, call."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_prime
from megatron_prime.config.loader import load_config, load_verifier_section
from megatron_prime.config.plan import batch_plan
from megatron_prime.config.schema import AnyConfig, ParallelSection, PrimeConfig, SftConfig
from megatron_prime.errors import ConfigError, PrimeError, RunInterrupted
from megatron_prime.launch import command
from megatron_prime.launch.hardware import PROFILES
from megatron_prime.launch.interrupt import INTERRUPTED
from megatron_prime.launch.local import is_launched, launch_local
from megatron_prime.launch.plan import make_plan
from megatron_prime.launch.plan_text import plan_rows
from megatron_prime.launch.search import hardware_of, search_layouts
from megatron_prime.preflight import check

_SPEAK_AFTER_SECONDS = 2.0
_NUM_LAYOUTS = 3
_CONFIGS = Path(megatron_prime.__file__).resolve().parents[1] / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0: done. 1: `check` found that a plan does not fit. 2: the input is at fault. 75: stopped on request and saved; the
    same command goes on. Anything else: a process ended in another way.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_prime").setLevel(logging.INFO if _is_main() else logging.WARNING)
    try:
        return options.command(options, arguments)
    except RunInterrupted as stop:
        if _is_main():
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except PrimeError as error:
        if not _is_main():
            # Most errors reach every rank alike; the main one's exit then ends this process before it speaks.
            time.sleep(_SPEAK_AFTER_SECONDS)
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        where = "" if _is_main() else f"rank {os.environ['RANK']}: "
        print(f"{where}{type(error).__name__}:\n{lines}", file=sys.stderr)
        return 2


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    kind = SftConfig if options.name == "sft" else PrimeConfig
    config = load_config(options.config, options.overrides)
    if not isinstance(config, kind):
        raise ConfigError(f"kind: {options.config} is a {config.kind!r} configuration; use its own command")
    return _run(config, arguments)


def _run(config: AnyConfig, arguments: list[str]) -> int:
    from megatron_prime import build

    if not is_launched() and config.parallel.world_size > 1:
        check(config)
        return launch_local(arguments, config.parallel.world_size, config.run.num_threads)
    summary = build.run(config)
    if _is_main():
        from megatron_prime.observe.report import final_table

        print(final_table(summary))
        print(f"everything is in {Path(config.run.directory) / config.run.name}/")
    return 0


def _launch(options: argparse.Namespace, arguments: list[str]) -> int:
    return command.run(options, start=_run, check=check)


def _demo(options: argparse.Namespace, arguments: list[str]) -> int:
    """SFT and then PRIME with the shipped configurations, each as its own command would run it."""
    if any(not override.startswith(("run.seed=", "rollout.")) for override in options.overrides):
        raise ConfigError("demo: takes only run.seed=N and rollout.*; use sft and train for anything else")
    for name, config in (("sft", "arithmetic_sft.yaml"), ("train", "arithmetic.yaml")):
        # Supervised runs sample nothing and have no rollout section.
        overrides = [o for o in options.overrides if name == "train" or not o.startswith("rollout.")]
        print(f"megatron-prime {name} {_CONFIGS / config} {' '.join(overrides)}", flush=True)
        status = main([name, str(_CONFIGS / config), *overrides])
        if status != 0:
            return status
    return 0


def _check(options: argparse.Namespace, arguments: list[str]) -> int:
    """Prints the plan; 1: it does not fit the machine."""
    config = load_config(options.config, options.overrides)
    architecture = check(config, check_files=not options.shapes_only)
    hardware = PROFILES[options.hardware or ("cpu" if config.model.dtype == "float32" else "h100")]
    mean = {"mean_response_tokens": options.mean_response_tokens}
    if options.gpus:
        num_gpus, hardware = hardware_of(options.gpus, hardware)
        found = search_layouts(config, architecture, hardware, num_gpus, **mean)
        for place, candidate in enumerate(found[:_NUM_LAYOUTS], start=1):
            print(f"{place}. {candidate.reason()}\n   {' '.join(candidate.overrides())}")
        return 0
    plan = make_plan(config, architecture, hardware, **mean)
    rows = batch_plan(config) + plan_rows(config, plan)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0 if plan.fits else 1


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.benchmarks:
        return _evaluate_benchmarks(options)
    from megatron_prime import build

    alone = [
        f"parallel.{size}=1" for size in ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    ]
    config = load_config(options.config, [*options.overrides, *alone, "parallel.sequence_parallel=false"])
    if not isinstance(config, PrimeConfig):
        raise ConfigError(f"kind: {options.config} is no PRIME configuration; evaluate needs its data and rollout")
    print(json.dumps(build.evaluate(config), indent=1))
    return 0


def _evaluate_benchmarks(options: argparse.Namespace) -> int:
    from megatron_prime.evaluate import EvaluationOptions, evaluate_benchmarks
    from megatron_prime.observe.report import benchmark_table

    if options.overrides:
        raise ConfigError(f"{options.overrides[0]}: --benchmarks takes a model and no configuration or overrides")
    given = {name: getattr(options, name) for name in EvaluationOptions.__slots__ if hasattr(options, name)}
    name = Path(os.path.normpath(options.config)).name
    given |= {
        "model": options.config,
        "benchmarks": tuple(name.strip() for name in options.benchmarks.split(",")),
        "output": options.output or str(Path("evaluations") / name),
    }
    print(benchmark_table(evaluate_benchmarks(EvaluationOptions(**given))), end="")
    print(f"everything is in {given['output']}/")
    return 0


def _prepare(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_prime.data.prepare.pipeline import CleaningOptions
    from megatron_prime.observe.report import cleaning_table
    from megatron_prime.prepare import PrepareOptions, prepare

    cleaning = CleaningOptions(
        multiple_choice=options.multiple_choice, similarity=options.similarity, references=options.references
    )
    report = prepare(
        PrepareOptions(
            sources=tuple(options.sources),
            output=options.output,
            benchmarks=options.benchmarks,
            split=options.split,
            num_workers=options.num_workers,
            cleaning=cleaning,
        )
    )
    print(cleaning_table(report), end="")
    return 0


def _generate(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_prime import build
    from megatron_prime.batch import SamplingParams

    sampling = SamplingParams(
        num_responses=options.num_responses,
        temperature=options.temperature,
        top_p=options.top_p,
        max_response_tokens=options.max_tokens,
        seed=options.seed,
    )
    answers = build.generate(
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


def _verify(options: argparse.Namespace, arguments: list[str]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_prime.verify.offline import verify_file

    given = options.overrides
    if options.config is None and not any(item.startswith("verifier.num_workers=") for item in given):
        given = [*given, f"verifier.num_workers={os.cpu_count() or 1}"]
    section = load_verifier_section(options.config, given)
    columns = TextColumn("graded"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("graded", total=None)
        summary = verify_file(
            Path(options.source),
            Path(options.target),
            section,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print("\n".join([*summary.lines(), f"wrote {options.target}"]))
    return 0


def _convert(options: argparse.Namespace, arguments: list[str]) -> int:
    parallel = ParallelSection(
        world_size=options.tensor_model_parallel_size * options.pipeline_model_parallel_size,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    if not is_launched() and parallel.world_size > 1:
        return launch_local(arguments, parallel.world_size, num_threads=1)

    from megatron_prime.mcore import convert
    from megatron_prime.mcore.parallel import parallel_layout

    source, target = Path(options.source), Path(options.target)
    shared: dict[str, Any] = {"dtype": options.dtype, "parallel": parallel}
    with parallel_layout(parallel, seed=1) as layout:
        if options.direction == "to-megatron":
            convert.to_megatron(source, target, layout=layout, **shared)
        else:
            like = Path(options.like) if options.like else None
            convert.to_hf(source, target, like=like, layout=layout, **shared)
    if _is_main():
        print(f"wrote {target}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-prime", description="PRIME reinforcement learning on Megatron-Core")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    overrides = {"nargs": "*", "metavar": "KEY=VALUE", "help": "override a key of the configuration, a.b=c"}

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function, name=name)
        return sub

    demo = add("demo", _demo, "the whole story in minutes on a CPU: SFT, then PRIME, in runs/demo/")
    demo.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="run.seed=N, rollout.engine=vllm")
    for name, function, text in (
        ("train", _train, "train by PRIME"),
        ("sft", _train, "make the starting model by supervised fine-tuning"),
        ("check", _check, "resolve and validate a configuration and print the plan; starts nothing"),
    ):
        sub = add(name, function, text)
        sub.add_argument("config", help="YAML file")
        sub.add_argument("overrides", **overrides)  # type: ignore[arg-type]
        if name == "check":
            text = "plan for another machine: no weights or data files, of model.path only config.json"
            sub.add_argument("--shapes-only", action="store_true", help=text)
            sub.add_argument("--hardware", choices=sorted(PROFILES), help="default: h100, for float32 models cpu")
            sub.add_argument("--gpus", metavar="NxMGB", help="search layouts, e.g. 8x80GB, or 4x8x80GB for 4 nodes")
            text = "expected length of answers (default: a third of the limit)"
            sub.add_argument("--mean-response-tokens", type=_at_least_one, help=text)
    command.add_arguments(add("launch", _launch, "start a run here, on Slurm or with NeMo-Run; watch and end jobs"))
    text = "avg@k of a configuration's model.path on its evaluation prompts (JSON), or a model on published benchmarks"
    _add_evaluate(add("evaluate", _evaluate, text), overrides)
    _add_generate(add("generate", _generate, "sample answers of a model; prints one JSON row each"))
    _add_prepare(add("prepare", _prepare, "clean data sets for training: PRIME's steps that need no model"))
    _add_verify(add("verify", _verify, "grade a file of answers, math or code"))
    _add_convert(add("convert", _convert, "Hugging Face folder <-> Megatron distributed checkpoint"))
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number


def _probability(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return number


def _similarity(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _add_evaluate(parser: argparse.ArgumentParser, overrides: dict[str, Any]) -> None:
    parser.add_argument("config", help="YAML file; with --benchmarks a Hugging Face folder or Megatron checkpoint")
    parser.add_argument("overrides", **overrides)
    group = parser.add_argument_group("benchmarks (docs/evaluation.md)", "defaults are each benchmark's own protocol")
    group.add_argument("--benchmarks", metavar="NAME,NAME", help="aime24, math500, gsm8k, humaneval, ...")
    group.add_argument("--data", default="data", help="folder with one folder per benchmark (default: data)")
    group.add_argument("--output", help="answers, results.json, results.txt (default: evaluations/MODEL)")
    group.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    group.add_argument("--tensor-parallel-size", type=_at_least_one, default=1, help="GPUs of a vLLM engine")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    group.add_argument("--num-samples", type=_at_least_one, help="answers per problem")
    group.add_argument("--temperature", type=_temperature, help="0 = greedy")
    group.add_argument("--top-p", type=_probability)
    group.add_argument("--max-tokens", type=_at_least_one, help="longest answer")
    group.add_argument("--num-problems", type=_at_least_one, help="only the first ones")
    group.add_argument("--system-prompt", choices=["prime", "none"], default="prime")
    group.add_argument("--template", choices=["chat", "raw"], default="chat", help="raw: no chat template")
    group.add_argument("--seed", type=int, default=1)
    group.add_argument("--num-workers", type=_at_least_one, default=os.cpu_count() or 1, help="processes that grade")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="in", help=".jsonl, .json, .parquet or hf:NAME[:CONFIG]:SPLIT")
    parser.add_argument("output", metavar="out", help="new .jsonl or .parquet file; the report lies beside it")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="leave out what is in these benchmarks")
    text = "open: ask without the choices where a rule can; drop: leave such questions out (default: open)"
    parser.add_argument("--multiple-choice", choices=["open", "drop"], default="open", help=text)
    text = "share of common three-word runs that makes two problems the same; above 1: none (default: 0.8)"
    parser.add_argument("--similarity", type=_similarity, default=0.8, help=text)
    text = "reference programs: run those there are, require one, or ignore them (default: run)"
    parser.add_argument("--references", choices=["run", "require", "ignore"], default="run", help=text)
    parser.add_argument("--split", default="train", help="name in extra_info (default: train)")
    parser.add_argument("--num-workers", type=_at_least_one, default=os.cpu_count() or 1, help="run programs at once")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, or Megatron checkpoint of `convert`")
    parser.add_argument("questions", nargs="+", help="questions, taken as they are")
    parser.add_argument("--ability", choices=["math", "code"], default="math", help="which of PRIME's suffixes")
    parser.add_argument("--raw", action="store_true", help="no system prompt, suffix or chat template")
    parser.add_argument("--max-tokens", type=_at_least_one, default=1024)
    parser.add_argument("--num-responses", type=_at_least_one, default=1)
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-p", type=_probability, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    text = "JSONL: response, ground_truth, ability (math, code), optionally data_source, extra_info"
    parser.add_argument("source", metavar="IN.jsonl", help=text)
    text = "the same rows with status, reward and seconds; goes on where an earlier call has stopped"
    parser.add_argument("target", metavar="OUT.jsonl", help=text)
    parser.add_argument("overrides", nargs="*", metavar="verifier.KEY=VALUE", help="docs/configuration.md")
    parser.add_argument("--config", help="YAML file whose section `verifier` says how to grade")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=["to-megatron", "to-hf"])
    parser.add_argument("source", help="Hugging Face folder, or Megatron checkpoint")
    parser.add_argument("target", help="new folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the source is stored")
    parser.add_argument("--like", help="to-hf: Hugging Face folder with config.json and tokenizer (default: kept copy)")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main())
