"""The arithmetic of a run in words, for `megatron-prime check`."""

from __future__ import annotations

from megatron_prime.config.checks import data_parallel_size
from megatron_prime.config.schema import AnyConfig, PrimeConfig, SftConfig
from megatron_prime.planner.workload import has_reference


def batch_plan(config: AnyConfig) -> list[tuple[str, str]]:
    """What a checked configuration will do each step.

    Args:
        config: a configuration without problems.

    Returns:
        Rows of (subject, text) for a table.
    """
    rows = [("layout", _layout(config))]
    rows += _sft_rows(config) if isinstance(config, SftConfig) else _prime_rows(config)
    return [*rows, ("micro-batches", _micro_batches(config))]


def _layout(config: AnyConfig) -> str:
    parallel = config.parallel
    return (
        f"{parallel.world_size} processes = {parallel.tensor_model_parallel_size} tensor"
        f" x {parallel.pipeline_model_parallel_size} pipeline"
        + (f" x {parallel.context_parallel_size} context" if parallel.context_parallel_size > 1 else "")
        + f" x {data_parallel_size(parallel)} data parallel"
        + (f", experts over {size}" if (size := parallel.expert_model_parallel_size) > 1 else "")
    )


def _micro_batches(config: AnyConfig) -> str:
    micro_batch = config.micro_batch
    size = (
        f"{micro_batch.micro_batch_size} sequences"
        if micro_batch.micro_batch_size is not None
        else f"at most {micro_batch.micro_batch_tokens} tokens"
    )
    return f"{size}, {'packed' if micro_batch.packed else 'padded'}"


def _sft_rows(config: SftConfig) -> list[tuple[str, str]]:
    batch_size = config.sft.batch_size
    return [
        ("models", f"policy from {config.model.path} ({config.model.init}, {config.model.dtype})"),
        ("batch", f"{batch_size} examples, about {batch_size / data_parallel_size(config.parallel):g} per replica"),
        ("run", f"{config.run.num_steps} optimizer steps, {config.run.num_steps * batch_size} examples"),
    ]


def _prime_rows(config: PrimeConfig) -> list[tuple[str, str]]:
    num_prompts, num_responses = config.rollout.num_prompts, config.rollout.num_responses
    num_rows = num_prompts * num_responses
    attempts = config.filter.max_attempts if config.filter.enabled else 1
    policy = config.policy
    rows = [
        ("models", _models(config)),
        ("rollouts", f"{num_prompts} prompts x {num_responses} = {num_rows} responses per step"),
        ("sampling", f"at most {attempts * num_rows} responses per step ({attempts} rounds of filtering)"),
        (
            "policy update",
            f"{_count(policy.num_minibatches * policy.num_epochs, 'optimizer step')} per step, each of"
            f" about {num_rows / policy.num_minibatches:g} responses",
        ),
    ]
    if config.uses_prm:
        window = config.prm.num_window_batches
        batches = _count(window, "batch", "batches")
        rows.append(
            (
                "PRM update",
                f"{_count(config.prm.num_minibatches * window, 'optimizer step')} per step, each of about"
                f" {num_rows / config.prm.num_minibatches:g} responses (window of {batches})",
            )
        )
    return [*rows, ("run", f"{config.run.num_steps} steps, {config.run.num_steps * num_rows} trained responses")]


def _models(config: PrimeConfig) -> str:
    models, places = ["policy"], [config.model.path]
    if config.uses_prm:
        models.append("PRM")
        places.append(config.prm.path or config.model.path)
    if has_reference(config):
        models.append("frozen reference")
        places.append(config.model.path)
    if len(set(places)) == 1:
        text = f"{', '.join(models)} from {places[0]}"
    else:
        text = ", ".join(f"{model} from {place}" for model, place in zip(models, places, strict=True))
    return f"{text} ({config.model.dtype})"


def _count(number: int, what: str, plural: str | None = None) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {plural or what + 's'}"
