"""The command line: parse, load the configuration, call."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_prime.assembly.preflight import check, read_examples, read_prompts
from megatron_prime.commands import launch as command
from megatron_prime.commands.demo import demo_commands
from megatron_prime.commands.parser import build_parser
from megatron_prime.config.loader import load_config, load_verifier_section
from megatron_prime.config.schema import AnyConfig, PrimeConfig, SftConfig
from megatron_prime.errors import ConfigError, PrimeError, RunInterrupted
from megatron_prime.launch.local import is_launched, launch_local
from megatron_prime.planner.batch_plan import batch_plan
from megatron_prime.planner.hardware import PROFILES
from megatron_prime.planner.plan import make_plan
from megatron_prime.planner.plan_text import plan_rows
from megatron_prime.planner.search import hardware_of, search_layouts
from megatron_prime.watch.exit_status import FAILED, INPUT_AT_FAULT, INTERRUPTED
from megatron_prime.watch.rank_status import SIGNS

_SPEAK_AFTER_SECONDS = 2.0
_SAID_ALIKE = ("data", "trainer", "mcore", "kernels", "verify.code.verifier")
"""Modules that all ranks run on the same values: what they warn of is said once."""
_NUM_LAYOUTS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    Args:
        arguments: of the command line, without the program; by default those of this process.

    0: done. 1: `check` found that a plan does not fit. The others: `watch/exit_status.py`; 128 + n: ended by signal n.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_prime").setLevel(logging.INFO if _is_main() else logging.WARNING)
    for name in () if _is_main() else _SAID_ALIKE:
        logging.getLogger(f"megatron_prime.{name}").setLevel(logging.ERROR)
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
        return INPUT_AT_FAULT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return FAILED


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    kind = SftConfig if options.name == "sft" else PrimeConfig
    config = load_config(options.config, options.overrides)
    if not isinstance(config, kind):
        raise ConfigError(f"kind: {options.config} is a {config.kind!r} configuration; use its own command")
    return _run(config, arguments)


def _run(config: AnyConfig, arguments: list[str]) -> int:
    if not is_launched() and config.parallel.world_size > 1:
        # The ranks look at files; to do it here too would import torch once more, for seconds.
        check(config, check_files=False)
        signs = Path(config.run.directory) / config.run.name / SIGNS
        return launch_local(arguments, config.parallel.world_size, config.run.num_threads, signs)
    from megatron_prime.assembly import run as build

    # A crash in native code then shows where Python was.
    faulthandler.enable()
    summary = build.run(config, ends_process=True)
    if _is_main():
        from megatron_prime.observe.report import final_table

        print(final_table(summary))
        print(f"everything is in {Path(config.run.directory) / config.run.name}/")
    return 0


def _launch(options: argparse.Namespace, arguments: list[str]) -> int:
    return command.run(options, start=_run, check=check)


def _serve(options: argparse.Namespace, arguments: list[str]) -> int:
    """Becomes a vLLM server for the runs of a configuration; returns only if it cannot."""
    import torch

    from megatron_prime.assembly.engines import engine_options
    from megatron_prime.rollout.vllm.worker.serve_command import of_a_server, server_command

    config = load_config(options.config, options.overrides)
    if not isinstance(config, PrimeConfig):
        raise ConfigError(f"kind: {options.config} is a {config.kind!r} configuration, which has no rollouts")
    config.rollout.engine = "vllm"
    # A server needs none of the trainer's GPUs or data.
    section, architecture = config.rollout.vllm, check(config, check_files=False)
    engine = engine_options(config.model.path, config.model.dtype, section, architecture)
    engine = of_a_server(engine, options.overrides, on_gpu=torch.cuda.is_available())
    command, environment = server_command(engine, options.host, options.port, section.num_threads)
    print(f"vLLM of {config.model.path} on http://{options.host}:{options.port}, without weights yet", flush=True)
    os.execvpe(command[0], command, environment)


def _replay(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_prime.commands.replay import ReplayOptions, replay, replay_config

    chosen = ReplayOptions(file=options.file, weights=options.weights)
    config = replay_config(chosen)
    if not is_launched() and config.parallel.world_size > 1:
        return launch_local(arguments, config.parallel.world_size, config.run.num_threads)
    lines = replay(chosen)
    if _is_main():
        print("\n".join(lines))
    return 0


def _demo(options: argparse.Namespace, arguments: list[str]) -> int:
    for half in demo_commands(options.overrides):
        print(f"megatron-prime {' '.join(half)}", flush=True)
        if status := main(half):
            return status
    return 0


def _check(options: argparse.Namespace, arguments: list[str]) -> int:
    """Prints the plan; 1: it does not fit the machine."""
    config = load_config(options.config, options.overrides)
    architecture = check(config, check_files=not options.shapes_only)
    if not options.shapes_only:
        read_prompts(config) if isinstance(config, PrimeConfig) else read_examples(config)
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
    from megatron_prime.assembly import run as build

    if Path(options.config).is_dir():
        raise ConfigError(f"{options.config}: a model needs --benchmarks NAME,NAME; without them name a YAML file")
    defaults = vars(_parser().parse_args(["evaluate", options.config]))
    changed = [name for name, value in vars(options).items() if name in defaults and value != defaults[name]]
    if others := [name for name in changed if name != "overrides"]:
        raise ConfigError(f"--{others[0].replace('_', '-')}: goes with --benchmarks; a configuration takes KEY=VALUE")
    config = _alone(options.config, options.overrides)
    print(json.dumps(build.evaluate(config), indent=1))
    return 0


def _alone(path: str, overrides: list[str]) -> PrimeConfig:
    """A run's configuration for one process that samples and trains nothing."""
    if not isinstance(load_config(path, overrides), PrimeConfig):
        raise ConfigError(f"kind: {path} is no PRIME configuration; evaluate needs its data and rollout")
    sizes = (
        "world_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    )
    others = ("parallel.sequence_parallel=false", "parallel.virtual_pipeline_model_parallel_size=null")
    alone = [*(f"parallel.{size}=1" for size in sizes), *others, "rollout.vllm.in_ranks=false"]
    config = load_config(path, [*overrides, *alone])
    assert isinstance(config, PrimeConfig)
    return config


def _evaluate_benchmarks(options: argparse.Namespace) -> int:
    from megatron_prime.commands.evaluate import EvaluationOptions, evaluate_benchmarks
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
    from megatron_prime.commands.prepare import PrepareOptions, prepare
    from megatron_prime.data.prepare.pipeline import CleaningOptions
    from megatron_prime.observe.report import cleaning_table

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
    from megatron_prime.assembly import run as build
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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from megatron_prime.commands.convert import ConvertOptions, convert, dry_run

    chosen = ConvertOptions(**{name: getattr(options, name) for name in ConvertOptions.__slots__})
    if options.dry_run:
        print("\n".join(dry_run(chosen)))
        return 0
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        lines = convert(chosen, show)
    print("\n".join([*lines, f"wrote {options.target}"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    return build_parser(
        {
            "demo": _demo,
            "train": _train,
            "sft": _train,
            "check": _check,
            "serve": _serve,
            "replay": _replay,
            "launch": _launch,
            "evaluate": _evaluate,
            "generate": _generate,
            "prepare": _prepare,
            "verify": _verify,
            "convert": _convert,
        }
    )
