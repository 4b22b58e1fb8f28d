"""Whether metrics loggers of the user's own take the metrics of a run, and of one that goes on."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from megatron_prime import sockets
from megatron_prime.assembly.contracts.trying import raised
from megatron_prime.config import AnyConfig, to_dict
from megatron_prime.errors import PrimeError


def check_own_loggers(config: AnyConfig) -> list[str]:
    """Lets each log two steps, and the second once more as a resumed run does; lines as those of `check_sockets`."""
    problems = []
    for name in config.run.loggers:
        if sockets.is_own("run.loggers", name):
            problems += _problems(config, name)
        elif name == "wandb" and importlib.util.find_spec("wandb") is None:
            problems.append("run.loggers: wandb is not installed; pip install 'megatron-prime[wandb]', or leave it out")
    return problems


def _problems(config: AnyConfig, name: str) -> list[str]:
    # TensorBoard and torch, which a configuration without loggers of its own does without.
    from megatron_prime.observe.loggers import LoggerRequest, make_logger

    with tempfile.TemporaryDirectory() as folder:
        for resume_step, steps in ((None, (0, 1, 2)), (1, (2,))):
            request = LoggerRequest(
                folder=Path(folder),
                run_name=config.run.name,
                num_steps=config.run.num_steps,
                config=to_dict(config),
                resume_step=resume_step,
                is_trial=True,
            )
            what = f"run.loggers: {name}" + ("" if resume_step is None else ", in the folder of an earlier run,")
            try:
                logger = make_logger(name, request)
                for step in steps:
                    # Rows differ: an evaluation has metrics of its own.
                    logger.log(step, {"evaluation/accuracy": 0.5} if step == 0 else {"policy/loss": 0.25})
                logger.close()
            except PrimeError as error:
                return [f"{error}; return an object with log(step, metrics) and close()"]
            except Exception as error:
                return [raised(what, error)]
    return []
