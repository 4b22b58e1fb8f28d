"""The command line of `megatron-prime launch`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from megatron_prime.commands.argument_types import at_least_one, not_negative, numbers
from megatron_prime.config import load_config
from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.launch import slurm

Start = Callable[[AnyConfig, list[str]], int]
"""Runs a configuration on this machine, given the arguments of its own command."""

_SERVED = ("rollout.engine=vllm", "rollout.vllm.servers=[http://server:8000]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser its subcommands."""
    ways = parser.add_subparsers(required=True, metavar="WAY", dest="way")
    for way, text in (
        ("local", "processes of this machine"),
        ("slurm", "a job of Slurm, which saves, is requeued and goes on until it is done"),
        ("nemo-run", "an experiment of NeMo-Run (make setup-nemo-run)"),
    ):
        sub = ways.add_parser(way, help=text, description=text)
        sub.add_argument("config", help="YAML file")
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
        sub.add_argument("--dry-run", action="store_true", help="print exactly what would run; start nothing")
        if way != "local":
            _add_cluster_options(sub, way)
    for way, text in (
        ("status", "state, nodes, restarts and the end of the log of a job"),
        ("stop", "save after the running step and be requeued"),
        ("cancel", "end a job for good"),
        ("attach", "a shell beside the ranks of a job"),
    ):
        sub = ways.add_parser(way, help=text, description=text)
        sub.add_argument("job", help="job id")


def _add_cluster_options(parser: argparse.ArgumentParser, way: str) -> None:
    parser.add_argument("--tasks-per-node", type=at_least_one, default=8, help="ranks of a node (default: 8)")
    parser.add_argument("--gpus-per-node", type=not_negative, default=0, help="default: 0, ranks on CPUs")
    for name in ("time", "partition", "account", "qos", "exclude"):
        parser.add_argument(f"--{name}", help=f"as sbatch's --{name}")
    text = "how long before the time limit the run saves; more than its longest step (default: 300)"
    parser.add_argument("--save-seconds", type=at_least_one, default=300, help=text)
    parser.add_argument("--python", help="interpreter on the nodes (default: .venv/bin/python here)")
    parser.add_argument("--container", help="image for pyxis")
    parser.add_argument("--mounts", help="folders for the container, A:B,...")
    if way == "slurm":
        parser.add_argument("--seeds", type=numbers, default=(), help="array job, one task per seed: 1,2,3")
        text = "further nodes for vLLM servers, in the same (heterogeneous) job (default: 0, engines beside the ranks)"
        parser.add_argument("--server-nodes", type=not_negative, default=0, metavar="N", help=text)
        text = "more of sbatch's, repeatable: --sbatch=--mem=0"
        parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=text)
    else:
        parser.add_argument("--executor", choices=["local", "slurm"], default="slurm")


def run(options: argparse.Namespace, start: Start, check: Callable[[AnyConfig], object]) -> int:
    """Does what was asked; returns the exit status.

    Args:
        options: parsed by `add_arguments`.
        start: for `local`.
        check: refuses a configuration that cannot run; for a dry run it is not asked.
    """
    way = options.way
    if way == "status":
        print("\n".join(f"{subject:<12} {text}" for subject, text in slurm.status(options.job)))
        return 0
    if way in ("cancel", "stop"):
        (slurm.cancel if way == "cancel" else slurm.stop)(options.job)
        return 0
    if way == "attach":
        command = slurm.attach_command(options.job)
        os.execvp(command[0], command)
    config = load_config(options.config, options.overrides)
    if getattr(options, "server_nodes", 0) and isinstance(config, PrimeConfig):
        # The job puts its servers' addresses there.
        config = load_config(options.config, [*options.overrides, *_SERVED])
    if not options.dry_run:
        check(config)
    if way == "local":
        return _local(options, config, start)
    if way == "slurm":
        return _slurm(options, config)
    return _nemo_run(options, config)


def _local(options: argparse.Namespace, config: AnyConfig, start: Start) -> int:
    if options.dry_run:
        print(slurm.local_command(config, options.config, options.overrides))
        return 0
    kind = "train" if isinstance(config, PrimeConfig) else "sft"
    return start(config, [kind, options.config, *options.overrides])


def slurm_options(options: argparse.Namespace) -> slurm.SlurmOptions:
    """The parsed options of a cluster."""
    names = ("time", "partition", "account", "qos", "exclude", "save_seconds", "python", "container", "mounts")
    return slurm.SlurmOptions(
        tasks_per_node=options.tasks_per_node,
        gpus_per_node=options.gpus_per_node,
        seeds=getattr(options, "seeds", ()),
        server_nodes=getattr(options, "server_nodes", 0),
        sbatch_options=tuple(getattr(options, "sbatch", ())),
        **{name: getattr(options, name) for name in names},
    )


def _slurm(options: argparse.Namespace, config: AnyConfig) -> int:
    path = str(Path(options.config).resolve())
    command = slurm.sbatch_command(config, path, options.overrides, slurm_options(options))
    if options.dry_run:
        print(shlex.join(command))
        return 0
    job = slurm.submit(command)
    print(f"job {job}; megatron-prime launch status {job}")
    return 0


def _nemo_run(options: argparse.Namespace, config: AnyConfig) -> int:
    """One run as an experiment of one task."""
    from megatron_prime.launch import nemo_run

    world_size = config.parallel.world_size
    recipe = nemo_run.train_recipe if isinstance(config, PrimeConfig) else nemo_run.sft_recipe
    task = recipe(str(Path(options.config).resolve()), options.overrides)
    detached = options.executor == "slurm"
    if detached:
        executor = nemo_run.slurm_executor(world_size, slurm_options(options))
    else:
        executor = nemo_run.local_executor(world_size)
    name = config.run.name.replace("/", "_")
    with nemo_run.nemo_run_module().Experiment(name) as experiment:
        experiment.add(task, executor=executor, name=name)
        if options.dry_run:
            experiment.dryrun()
            return 0
        experiment.run(detach=detached)
    return 0 if detached or nemo_run.succeeded(experiment) else 1
