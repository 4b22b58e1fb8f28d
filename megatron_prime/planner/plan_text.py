"""A plan in words, for `megatron-prime check` and docs/reference/recipes.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.planner.engines import describe_engine
from megatron_prime.planner.footprint import num_checkpoints
from megatron_prime.planner.hardware import GIB
from megatron_prime.planner.plan import PhaseMemory, Plan


def plan_rows(config: AnyConfig, plan: Plan) -> list[tuple[str, str]]:
    """Rows of (subject, text).

    Args:
        config: what was planned.
        plan: from `make_plan`.
    """
    work, hardware = plan.workload, plan.hardware
    on_cpu = hardware.name == "cpu"
    rows = [("ranks", _ranks(config, plan))]
    rows += [(f"memory {phase.name}", _phase(phase)) for phase in plan.phases]
    room = f"{plan.peak_gib:.1f} of {hardware.memory_gib:g} GiB in {plan.peak.name}"
    fitting = "fits" if plan.peak_gib <= hardware.memory_gib else "DOES NOT FIT; try check --gpus for layouts that do"
    rows.append(
        ("memory peak" if on_cpu else "GPU memory peak", f"{room} ({hardware.reserved_gib:g} reserved): {fitting}")
    )
    host = plan.host_bytes / GIB
    fitting = "fits" if host <= hardware.host_memory_gib else "DOES NOT FIT; lower verifier.num_workers"
    rows.append(("host memory", f"{host:.3g} of {hardware.host_memory_gib:g} GiB on a full node: {fitting}"))
    count = num_checkpoints(config)
    checkpoints = f"{count} {'checkpoint' if count == 1 else 'checkpoints'} of {_size(plan.checkpoint_bytes)}"
    rows.append(("disk", f"{_size(plan.disk_bytes)}: {checkpoints} and the exported models"))
    rows.append((f"sent per {'process' if on_cpu else 'GPU'}", f"{_sum(plan.traffic, _size)} per step"))
    lengths = f"prompts of {work.prompt_tokens:.0f} and answers of {work.response_tokens:.0f} tokens on average"
    if work.num_sampled:
        lengths += f", {work.num_sampled} answers sampled for {work.num_rows} that train"
    rows.append(("assumed", f"{hardware.name}; {lengths}"))
    rows.append(("step time", f"about {_seconds(plan.step_seconds)} = {_sum(plan.seconds, _seconds)}"))
    rows.append(("run time", _run_time(plan.step_seconds * config.run.num_steps, config.parallel.world_size)))
    return rows


def _ranks(config: AnyConfig, plan: Plan) -> str:
    world_size, per_node = config.parallel.world_size, plan.hardware.num_gpus_per_node
    nodes = math.ceil(world_size / per_node)
    text = f"{world_size} on {nodes} {'node' if nodes == 1 else 'nodes'}, every one with its shard of every model"
    if not isinstance(config, PrimeConfig):
        return text
    return f"{text}; {describe_engine(config)}"


def _phase(phase: PhaseMemory) -> str:
    """Total and parts; the parts of a model in one number."""
    groups: dict[str, float] = {}
    for name, value in phase.parts.items():
        owner = name.split()[0]
        key = owner if owner in ("policy", "PRM", "reference") else name
        groups[key] = groups.get(key, 0.0) + value
    return f"{phase.total / GIB:.3g} GiB = " + " + ".join(f"{name} {value / GIB:.3g}" for name, value in groups.items())


def _sum(parts: Mapping[str, float], text: Callable[[float], str]) -> str:
    return " + ".join(f"{name} {text(value)}" for name, value in parts.items())


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _run_time(seconds: float, num_processes: int) -> str:
    unit, size = next((u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 0)) if seconds >= s)
    total = seconds / max(size, 1)
    return f"about {_plain(total)} {unit}, {_plain(total * num_processes)} process {unit}, evaluations not counted"


def _plain(number: float) -> str:
    """Three digits that count, never with an exponent."""
    return f"{float(f'{number:.3g}'):,.15g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
