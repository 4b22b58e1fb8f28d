"""`megatron-prime launch`: runs started here, on Slurm or with NeMo-Run, and jobs watched and ended."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from megatron_prime.assembly.preflight import check
from megatron_prime.commands import train
from megatron_prime.commands.arguments import (
    Commands,
    add_command,
    add_configuration,
    at_least_one,
    not_negative,
    numbers,
)
from megatron_prime.config import load_config
from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.launch import slurm
from megatron_prime.launch.local import command_of, local_command

_SERVED = ("rollout.engine=vllm", "rollout.vllm.servers=[http://server:8000]")


def add_parser(commands: Commands) -> None:
    text = "start a run here, on Slurm or with NeMo-Run; watch and end jobs"
    ways = commands.add_parser("launch", help=text, description=text).add_subparsers(required=True, metavar="WAY")
    for name, text, run in (
        ("local", "processes of this machine", _local),
        ("slurm", "a job of Slurm, which saves, is requeued and goes on until it is done", _slurm),
        ("nemo-run", "an experiment of NeMo-Run (make setup-nemo-run)", _nemo_run),
    ):
        parser = add_command(ways, name, text, run)
        add_configuration(parser)
        parser.add_argument("--dry-run", action="store_true", help="print exactly what would run; start nothing")
        if name != "local":
            _add_cluster_options(parser)
        if name == "slurm":
            _add_slurm_options(parser)
        if name == "nemo-run":
            parser.add_argument("--executor", choices=["local", "slurm"], default="slurm")
    for name, text, run in (
        ("status", "state, nodes, restarts and the end of the log of a job", _status),
        ("stop", "save after the running step and be requeued", _stop),
        ("cancel", "end a job for good", _cancel),
        ("attach", "a shell beside the ranks of a job", _attach),
    ):
        add_command(ways, name, text, run).add_argument("job", help="job id")


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks-per-node", type=at_least_one, default=8, help="ranks of a node (default: 8)")
    parser.add_argument("--gpus-per-node", type=not_negative, default=0, help="default: 0, ranks on CPUs")
    for name in ("time", "partition", "account", "qos", "exclude"):
        parser.add_argument(f"--{name}", help=f"as sbatch's --{name}")
    text = "how long before the time limit the run saves; more than its longest step (default: 300)"
    parser.add_argument("--save-seconds", type=at_least_one, default=300, help=text)
    parser.add_argument("--python", help="interpreter on the nodes (default: .venv/bin/python here)")
    parser.add_argument("--container", help="image for pyxis")
    parser.add_argument("--mounts", help="folders for the container, A:B,...")


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=numbers, default=(), help="array job, one task per seed: 1,2,3")
    text = "further nodes for vLLM servers, in the same (heterogeneous) job (default: 0, engines beside the ranks)"
    parser.add_argument("--server-nodes", type=not_negative, default=0, metavar="N", help=text)
    text = "more of sbatch's, repeatable: --sbatch=--mem=0"
    parser.add_argument("--sbatch", dest="sbatch_options", action="append", default=[], metavar="OPTION", help=text)


def _status(options: argparse.Namespace) -> int:
    print("\n".join(f"{subject:<12} {text}" for subject, text in slurm.status(options.job)))
    return 0


def _stop(options: argparse.Namespace) -> int:
    slurm.stop(options.job)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    slurm.cancel(options.job)
    return 0


def _attach(options: argparse.Namespace) -> int:
    command = slurm.attach_command(options.job)
    os.execvp(command[0], command)


def _checked(options: argparse.Namespace, overrides: list[str]) -> AnyConfig:
    """The configuration; where something is to be started, one that can run."""
    config = load_config(options.config, overrides)
    if not options.dry_run:
        check(config)
    return config


def _local(options: argparse.Namespace) -> int:
    config = _checked(options, options.overrides)
    if options.dry_run:
        print(local_command(config, options.config, options.overrides))
        return 0
    return train.start(config, [command_of(config), options.config, *options.overrides])


def _slurm(options: argparse.Namespace) -> int:
    overrides = options.overrides
    if options.server_nodes and isinstance(load_config(options.config, overrides), PrimeConfig):
        # The job puts its servers' addresses there.
        overrides = [*overrides, *_SERVED]
    config = _checked(options, overrides)
    path = str(Path(options.config).resolve())
    command = slurm.sbatch_command(config, path, options.overrides, _slurm_options(options))
    if options.dry_run:
        print(shlex.join(command))
        return 0
    job = slurm.submit(command)
    print(f"job {job}; megatron-prime launch status {job}")
    return 0


def _slurm_options(options: argparse.Namespace) -> slurm.SlurmOptions:
    given = vars(options)
    return slurm.SlurmOptions(**{name: given[name] for name in slurm.SlurmOptions.__slots__ if name in given})


def _nemo_run(options: argparse.Namespace) -> int:
    """One run as an experiment of one task."""
    from megatron_prime.launch import nemo_run

    config = _checked(options, options.overrides)
    world_size = config.parallel.world_size
    task = nemo_run.recipe(command_of(config), str(Path(options.config).resolve()), options.overrides)
    detached = options.executor == "slurm"
    if detached:
        executor = nemo_run.slurm_executor(world_size, _slurm_options(options))
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
