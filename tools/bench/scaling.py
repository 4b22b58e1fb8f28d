"""What the ranks of each layout send in one PRIME step, counted at the process groups, and weak scaling over data.

A step is: scores of three models, an update of the PRM, an update of the policy, and the stream of its weights that an
engine or a folder reads. Answers are random and fixed. Counted is what a rank sends where collectives are rings: in a
group of n (n-1)/n of what the caller hands over (of a gather: its result), of an all-reduce twice that. Weak scaling:
two data-parallel ranks with twice the answers beside one rank, each with one thread. Prints two tables and writes
build/bench/scaling.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common.measuring import bench_parser, machine, write_result
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
TINY_SHAPE = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
NUM_RESPONSES, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 32, 96
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2, interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
    "DP2, distributed optimizer": {"use_distributed_optimizer": True},
}
PHASES = ("score", "PRM update", "policy update", "export")
# What a rank sends of the payload, by operation, in a group of n ranks.
OPERATIONS = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "allreduce_coalesced_": lambda n: 2 * (n - 1) / n,
    "allgather_into_tensor_coalesced_": lambda n: (n - 1) / n,
    "reduce_scatter_tensor_coalesced_": lambda n: (n - 1) / n,
    "allgather_": lambda n: (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "reduce_scatter_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
    "broadcast_": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


class Counting(TorchDispatchMode):
    """Sums the bytes that this rank sends through process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name in OPERATIONS:
                names = [argument.name for argument in func._schema.arguments]
                group = dist.ProcessGroup.unbox(args[names.index("process_group")])
                # The larger of input and output is the whole: a gather's result, a scatter's argument.
                payload = max(num_bytes(argument) for argument in args[:2])
                self.sent[name] += round(payload * OPERATIONS[name](group.size()))
            elif name not in ("recv_", "barrier", "monitored_barrier_"):
                raise NotImplementedError(f"c10d::{name} is not counted")
        return func(*args, **(kwargs or {}))


def num_bytes(argument: Any) -> int:
    """Of all tensors in a nested list."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.itemsize
    return sum(map(num_bytes, argument)) if isinstance(argument, list | tuple) else 0


def make_batch(num_responses: int) -> Any:
    """Random answers in groups of four, all of the same length."""
    from megatron_prime.batch import RolloutBatch

    generator = torch.Generator().manual_seed(1)
    shape = (num_responses, RESPONSE_TOKENS)
    return RolloutBatch(
        prompt_token_ids=tuple(tuple(range(10, 10 + PROMPT_TOKENS)) for _ in range(num_responses)),
        response_ids=torch.randint(0, TINY_SHAPE["vocab_size"], shape, generator=generator),
        mask=torch.ones(shape, dtype=torch.bool),
        rollout_logprobs=torch.zeros(shape),
        outcomes=torch.tensor([1.0, 0.0, 1.0, 0.0] * (num_responses // 4)),
        group_index=torch.arange(num_responses) // 4,
        weight_versions=torch.zeros(num_responses, dtype=torch.int64),
    )


@contextmanager
def roles(folder: str, sizes: dict[str, Any], world_size: int) -> Iterator[tuple[Any, Any, Any]]:
    """Policy, reference and PRM with random weights."""
    from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection, PolicySection, PrmSection
    from megatron_prime.mcore.parallel import parallel_layout
    from megatron_prime.mcore.prime_roles import PolicyRole, PrmRole, ReferenceRole
    from megatron_prime.mcore.role import RoleSetup
    from megatron_prime.weights.architecture import read_architecture

    parallel = ParallelSection(world_size=world_size, **sizes)
    with parallel_layout(parallel, seed=1) as layout:
        setup = RoleSetup(
            architecture=read_architecture(Path(folder)),
            model=ModelSection(path=folder, init="random"),
            parallel=parallel,
            micro_batch=MicroBatchSection(micro_batch_tokens=1024),
            layout=layout,
        )
        yield (
            PolicyRole(setup, PolicySection(), num_steps=10),
            ReferenceRole(setup),
            PrmRole(setup, PrmSection(), num_steps=10),
        )


def one_step(models: tuple[Any, Any, Any], rollout: Any) -> Iterator[str]:
    """A PRIME step on given answers, stopping after each phase."""
    policy, reference, prm = models
    old, start, before = policy.score(rollout, temperature=1.0), reference.score(rollout), prm.score(rollout)
    yield "score"
    prm.update(rollout, reference_logprobs=start, prm_logprobs=before, window=(), seed=1)
    yield "PRM update"
    advantages = torch.randn(rollout.mask.shape)
    policy.update(rollout, advantages, old_logprobs=old, reference_logprobs=start, temperature=1.0, seed=1)
    yield "policy update"
    for _ in policy.export_weights():
        pass
    yield "export"


def work(
    rank: int, world_size: int, port: int, folder: str, sizes: dict[str, Any], num_responses: int, num_timed: int
) -> None:
    """One rank: bytes sent by phase and operation of a step, and seconds of the fastest of others."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
    torch.set_num_threads(1)
    rollout = make_batch(num_responses)
    with roles(folder, sizes, world_size) as models:
        seconds = []
        for _ in range(num_timed):
            started = time.perf_counter()
            for _ in one_step(models, rollout):
                pass
            seconds.append(time.perf_counter() - started)
        sent = {}
        with Counting() as counting:
            for phase in one_step(models, rollout):
                sent[phase] = dict(counting.sent)
                counting.sent.clear()
        result = {"seconds": min(seconds), "sent": sent}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(result))


def measure(
    shape: dict[str, Any], sizes: dict[str, Any], world_size: int, num_responses: int, num_timed: int
) -> list[dict[str, Any]]:
    """The results of all ranks."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        Path(folder, "config.json").write_text(json.dumps(shape))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        arguments = (world_size, port, folder, sizes, num_responses, num_timed)
        mp.start_processes(work, args=arguments, nprocs=world_size, start_method="forkserver")
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    """Measures all layouts and reports."""
    options = bench_parser(__doc__).parse_args()
    # Ranks are forked from a process that has imported what they need.
    multiprocessing.set_forkserver_preload(["megatron_prime.mcore.prime_roles", "torch.distributed"])
    shape, repeats = (TINY_SHAPE, 1) if options.tiny else (SHAPE, 2)
    layouts = dict(list(LAYOUTS.items())[:1]) if options.tiny else LAYOUTS
    rows: list[dict[str, Any]] = []
    traffic = Table(title="MiB that the busiest of two ranks sends in a PRIME step")
    for column in ("layout", *PHASES, "whole step", "of it"):
        traffic.add_column(column)
    for name, sizes in layouts.items():
        ranks = measure(shape, sizes, 2, NUM_RESPONSES, num_timed=1)
        totals = [sum((Counter(phase) for phase in rank["sent"].values()), Counter()) for rank in ranks]
        busiest = max(range(2), key=lambda rank: totals[rank].total())
        by_phase = {phase: sum(ranks[busiest]["sent"][phase].values()) / 2**20 for phase in PHASES}
        kinds = ", ".join(
            f"{kind.strip('_')} {sent / 2**20:.1f}" for kind, sent in totals[busiest].most_common(3) if sent
        )
        rows.append({"variant": name, "seconds": max(r["seconds"] for r in ranks), "sent_mib": by_phase})
        traffic.add_row(name, *(f"{mib:.1f}" for mib in by_phase.values()), f"{sum(by_phase.values()):.1f}", kinds)
    scaling = Table(title="Weak scaling over data")
    for column in ("ranks", "answers", "seconds per step", "efficiency"):
        scaling.add_column(column)
    alone = min(measure(shape, {}, 1, NUM_RESPONSES, num_timed=3)[0]["seconds"] for _ in range(repeats))
    together = min(
        max(rank["seconds"] for rank in measure(shape, {}, 2, 2 * NUM_RESPONSES, num_timed=3)) for _ in range(repeats)
    )
    rows += [
        {"variant": "1 rank", "seconds": alone},
        {"variant": "ours", "seconds": together, "efficiency": alone / together},
    ]
    scaling.add_row("1", str(NUM_RESPONSES), f"{alone:.2f}", "")
    scaling.add_row("2", str(2 * NUM_RESPONSES), f"{together:.2f}", f"{alone / together:.0%}")
    console = Console(width=150)
    console.print(traffic)
    console.print(scaling)
    write_result("scaling", machine(), rows, options)


if __name__ == "__main__":
    main()
