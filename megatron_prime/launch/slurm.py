"""From a configuration to the `sbatch` command that runs it, and helpers for jobs that run."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prime.assets import ASSETS
from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.errors import LaunchError
from megatron_prime.launch.local import command_of

SCRIPT = ASSETS / "launch_prime.sbatch"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """Where and how a job runs; None leaves a choice to the cluster."""

    tasks_per_node: int = 8
    gpus_per_node: int = 0
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclude: str | None = None
    save_seconds: int = 300
    """How long before the time limit the run is asked to save: more than its longest step."""
    python: str | None = None
    container: str | None = None
    mounts: str | None = None
    seeds: tuple[int, ...] = ()
    """One array task each."""
    server_nodes: int = 0
    """Further nodes of a heterogeneous job, on which vLLM servers sample; 0: engines share the trainer's."""
    sbatch_options: tuple[str, ...] = ()
    """More options, as sbatch takes them."""


def sbatch_command(config: AnyConfig, config_path: str, overrides: Sequence[str], options: SlurmOptions) -> list[str]:
    """The command that submits a run.

    Args:
        config: resolved from path and overrides.
        config_path: as the job will read it.
        overrides: ``key=value``.
        options: of the cluster.

    Raises:
        LaunchError: ranks or servers that do not fill nodes evenly, or servers for a run that has no use for them.
    """
    world_size = config.parallel.world_size
    tasks = min(options.tasks_per_node, world_size)
    if world_size % tasks:
        raise LaunchError(
            f"--tasks-per-node: {world_size} ranks do not fill nodes of {tasks}; use a divisor of parallel.world_size"
        )
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={config.run.name.replace('/', '_')}",
        f"--nodes={math.ceil(world_size / tasks)}",
        f"--ntasks-per-node={tasks}",
        f"--signal=B:USR1@{options.save_seconds}",
    ]
    if options.seeds:
        command.append(f"--array={','.join(map(str, options.seeds))}")
        overrides = [*overrides, "run.seed=%a", f"run.name={config.run.name}_seed%a"]
    command += _component_options(options)
    if options.server_nodes:
        servers = _servers_per_node(config, options)
        command += [":", f"--nodes={options.server_nodes}", f"--ntasks-per-node={servers}"]
        command += _component_options(options)
    command.append(str(SCRIPT))
    for name in ("python", "container", "mounts"):
        if value := getattr(options, name):
            command += [f"--{name}", value]
    return [*command, "--", command_of(config), config_path, *overrides]


def _component_options(options: SlurmOptions) -> list[str]:
    """What is asked of the nodes that train and of those that sample alike."""
    gpus = [f"--gpus-per-node={options.gpus_per_node}", "--exclusive"] if options.gpus_per_node else []
    names = ("time", "partition", "account", "qos", "exclude")
    given = [f"--{name}={value}" for name in names if (value := getattr(options, name))]
    return [*gpus, *given, *options.sbatch_options]


def _servers_per_node(config: AnyConfig, options: SlurmOptions) -> int:
    """One server per `rollout.vllm.tensor_parallel_size` GPUs, or one on a node without GPUs."""
    if not isinstance(config, PrimeConfig):
        raise LaunchError("--server-nodes: a supervised run samples nothing; leave it out")
    if options.seeds:
        raise LaunchError("--server-nodes: Slurm has no arrays of heterogeneous jobs; submit each of --seeds by itself")
    size = config.rollout.vllm.tensor_parallel_size
    if not options.gpus_per_node:
        return 1
    if options.gpus_per_node % size:
        raise LaunchError(
            f"--server-nodes: servers of {size} GPUs do not fill nodes of {options.gpus_per_node}; choose a divisor for"
            " rollout.vllm.tensor_parallel_size"
        )
    return options.gpus_per_node // size


def submit(command: Sequence[str]) -> str:
    """Submits a job and returns its id.

    Raises:
        LaunchError: there is no Slurm, or it refuses the job.
    """
    return _slurm(command).split(";")[0].strip()


def status(job: str) -> list[tuple[str, str]]:
    """State of a job (every task of an array), where it runs, how often it was restarted, and the end of its log."""
    rows: list[tuple[str, str]] = []
    for line in _slurm(["scontrol", "-o", "show", "job", job]).splitlines():
        found = dict(re.findall(r"(\w+)=(\S*)", line))
        where = found.get("NodeList", "(null)").replace("(null)", "no nodes yet")
        text = f"{found.get('JobState')} ({found.get('Reason')}) on {where}, restarted {found.get('Restarts')} times"
        rows.append((f"job {found.get('JobId')}", f"{text}, ran {found.get('RunTime')} of {found.get('TimeLimit')}"))
        excluded = found.get("ExcNodeList", "(null)")
        if excluded != "(null)":
            rows.append(("excluded", excluded))
        log = Path(found.get("StdOut", ""))
        if log.is_file():
            rows.append(("log", str(log)))
            rows += [("", line) for line in log.read_text(errors="replace").splitlines()[-5:]]
    return rows


def cancel(job: str) -> None:
    """Ends a job for good; its run may still save within KillWait."""
    _slurm(["scancel", job])


def stop(job: str) -> None:
    """Asks a job to save after its step and be requeued, as before the time limit."""
    _slurm(["scancel", "--batch", "--signal=USR1", job])


def attach_command(job: str) -> list[str]:
    """A shell on the job's first node, beside its ranks."""
    return ["srun", f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", "--pty", "bash", "-l"]


def _slurm(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise LaunchError(f"{command[0]}: not found; run this on a machine of the cluster that has Slurm's commands")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LaunchError(f"{shlex.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
