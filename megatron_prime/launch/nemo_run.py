"""Runs as NeMo-Run tasks: recipes as `run.Partial`, executors, and an experiment that chains them.

NeMo-Run (``make setup-nemo-run``, or the extra ``launch``) is imported on first use, and nowhere else in the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_prime.errors import LaunchError
from megatron_prime.launch.slurm import SlurmOptions


def nemo_run_module() -> Any:
    """The package, or why it is not there."""
    try:
        import nemo_run  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LaunchError(
            f"nemo_run: cannot be imported ({error}); `make setup-nemo-run` installs it in an environment of its own,"
            " run this with .venv/nemo-run/bin/python -m megatron_prime"
        ) from error
    return nemo_run


def run_command(arguments: list[str], folder: str) -> None:
    """A task: becomes one rank of `megatron-prime ARGUMENTS` in a folder; its launcher has set RANK and the rest."""
    # NeMo-Run starts jobs of Slurm in the experiment's own folder, where a configuration's relative paths lead nowhere.
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-m", "megatron_prime", *arguments])


def recipe(command: Literal["train", "sft", "evaluate"], config: str, overrides: Sequence[str] = ()) -> Any:
    """A command on a configuration as `run.Partial`, in the folder that this is called in.

    Args:
        command: a PRIME run, a supervised one, or an evaluation in one process.
        config: YAML file, as the job will read it.
        overrides: ``key=value``.
    """
    return nemo_run_module().Partial(run_command, arguments=[command, config, *overrides], folder=os.getcwd())


def local_executor(num_tasks: int) -> Any:
    """Processes of this machine under torchrun.

    Args:
        num_tasks: ranks.
    """
    return nemo_run_module().LocalExecutor(
        ntasks_per_node=num_tasks, launcher="torchrun", env_vars={"OMP_NUM_THREADS": "1", "PATH": _path()}
    )


def slurm_executor(num_tasks: int, options: SlurmOptions) -> Any:
    """A Slurm job under torchrun, submitted from here.

    Args:
        num_tasks: ranks.
        options: of the cluster; seeds and sbatch options are `megatron-prime launch slurm`'s alone.

    Raises:
        LaunchError: ranks that do not fill nodes evenly.
    """
    tasks = min(options.tasks_per_node, num_tasks)
    if num_tasks % tasks:
        raise LaunchError(f"--tasks-per-node: {num_tasks} ranks do not fill nodes of {tasks}; use a divisor")
    run = nemo_run_module()
    return run.SlurmExecutor(
        # Mandatory in NeMo-Run; a cluster without accounting ignores it.
        account=options.account or "default",
        partition=options.partition,
        nodes=num_tasks // tasks,
        ntasks_per_node=tasks,
        gpus_per_node=options.gpus_per_node or None,
        time=options.time or "01:00:00",
        container_image=options.container,
        container_mounts=options.mounts.split(",") if options.mounts else [],
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        env_vars={"OMP_NUM_THREADS": "1"},
        setup_lines=f"export PATH={_path()}",
        launcher="torchrun",
        retries=3,
        additional_parameters={"signal": f"TERM@{options.save_seconds}"},
    )


def _path() -> str:
    """This interpreter's folder first: torchrun is found by name."""
    return f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"


def experiment(name: str, steps: Sequence[tuple[str, Any, Any]]) -> Any:
    """Tasks that run one after the other, each when the one before it has succeeded.

    Args:
        name: of the experiment.
        steps: (name, task, executor) in order.
    """
    result = nemo_run_module().Experiment(name)
    with result:
        before: list[str] = []
        for step, task, executor in steps:
            before = [result.add(task, executor=executor, name=step, dependencies=before or None)]
    return result


def succeeded(finished: Any) -> bool:
    """Whether every task of an experiment has ended well, after a run that waited for it."""
    return all(job.state.name == "SUCCEEDED" for job in finished.jobs)
