"""SFT, then PRIME, then evaluation of the arithmetic model as three dependent NeMo-Run tasks.

    .venv/nemo-run/bin/python examples/nemo_run/sft_prime_evaluate.py            # two processes of this machine
    .venv/nemo-run/bin/python examples/nemo_run/sft_prime_evaluate.py slurm      # Slurm jobs, one after the other
    .venv/nemo-run/bin/python examples/nemo_run/sft_prime_evaluate.py dry-run    # prints what would run

Overrides name their task: `sft.run.num_steps=500 prime.run.seed=2`. Needs `make setup-nemo-run` (or NeMo-Run in an
environment of yours), and the folder of the repository as working directory.
"""

import sys
from pathlib import Path

from megatron_prime.launch.nemo_run import experiment, local_executor, recipe, slurm_executor, succeeded
from megatron_prime.launch.slurm import SlurmOptions

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(way: str = "local", *overrides: str) -> int:
    """Runs or prints the experiment; 1 if a task has failed."""

    def executor(num_tasks: int):
        if way == "local":
            return local_executor(num_tasks)
        return slurm_executor(num_tasks, SlurmOptions(tasks_per_node=2, time="01:00:00"))

    def of(task: str) -> list[str]:
        return [override.removeprefix(f"{task}.") for override in overrides if override.startswith(f"{task}.")]

    sft, prime = str(CONFIGS / "arithmetic_sft.yaml"), str(CONFIGS / "arithmetic.yaml")
    steps = [
        ("sft", recipe("sft", sft, of("sft")), executor(2)),
        ("prime", recipe("train", prime, of("prime")), executor(2)),
        ("evaluate", recipe("evaluate", prime, ["model.path=runs/demo/hf", *of("evaluate")]), executor(1)),
    ]
    chain = experiment("sft-prime-evaluate", steps)
    with chain:
        if way == "dry-run":
            chain.dryrun()
            return 0
        chain.run(detach=False)
    return 0 if succeeded(chain) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
