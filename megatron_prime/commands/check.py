"""`megatron-prime check`: everything that can be known to be wrong, and the plan of a run."""

from __future__ import annotations

import argparse

from megatron_prime.assembly.preflight import check, check_programs, read_examples, read_prompts
from megatron_prime.commands.arguments import Commands, add_command, add_configuration, at_least_one
from megatron_prime.config import load_config
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.planner.batch_plan import batch_plan
from megatron_prime.planner.hardware import PROFILES
from megatron_prime.planner.plan import make_plan
from megatron_prime.planner.plan_text import plan_rows
from megatron_prime.planner.search import hardware_of, search_layouts

_NUM_LAYOUTS = 3


def add_parser(commands: Commands) -> None:
    text = "resolve and validate a configuration and print the plan; starts nothing"
    parser = add_command(commands, "check", text, run)
    add_configuration(parser)
    text = "plan for another machine: no weights or data files, of model.path only config.json"
    parser.add_argument("--shapes-only", action="store_true", help=text)
    parser.add_argument("--hardware", choices=sorted(PROFILES), help="default: h100, for float32 models cpu")
    parser.add_argument("--gpus", metavar="NxMGB", help="search layouts, e.g. 8x80GB, or 4x8x80GB for 4 nodes")
    text = "expected length of answers (default: a third of the limit)"
    parser.add_argument("--mean-response-tokens", type=at_least_one, help=text)


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 1: it does not fit the machine."""
    config = load_config(options.config, options.overrides)
    architecture = check(config, check_files=not options.shapes_only)
    if not options.shapes_only:
        if isinstance(config, PrimeConfig):
            check_programs(config, read_prompts(config))
        else:
            read_examples(config)
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
