"""SFT, then PRIME, then evaluation of the arithmetic model as three dependent NeMo-Run tasks.

    python examples/nemo_run/sft_prime_evaluate.py            # two processes of this machine
    python examples/nemo_run/sft_prime_evaluate.py slurm      # Slurm jobs, one after the other
    python examples/nemo_run/sft_prime_evaluate.py dry-run    # prints what would run

Needs the extra `launch` and the folder of the repository as working directory.
"""

import sys
from pathlib import Path

from megatron_prime.launch.nemo_run import (
    evaluate_recipe,
    experiment,
    local_executor,
    sft_recipe,
    slurm_executor,
    train_recipe,
)
from megatron_prime.launch.slurm import SlurmOptions

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(way: str = "local", *overrides: str) -> None:
    """Runs or prints the experiment; overrides go to the two training runs."""

    def executor(num_tasks: int):
        if way == "slurm":
            return slurm_executor(num_tasks, SlurmOptions(tasks_per_node=2, time="01:00:00"))
        return local_executor(num_tasks)

    sft, prime = str(CONFIGS / "arithmetic_sft.yaml"), str(CONFIGS / "arithmetic.yaml")
    steps = [
        ("sft", sft_recipe(sft, overrides), executor(2)),
        ("prime", train_recipe(prime, overrides), executor(2)),
        ("evaluate", evaluate_recipe(prime, ["model.path=runs/demo/hf"]), executor(1)),
    ]
    chain = experiment("sft-prime-evaluate", steps)
    with chain:
        if way == "dry-run":
            chain.dryrun()
        else:
            chain.run(sequential=True, detach=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
