"""How fast the nodes of a job exchange data: one process per rank, ``python -m megatron_prime.launch.bandwidth``.

Ranks of two nodes exchange messages, all pairs of nodes at once, in rounds with other partners; a node has the rate of
its slowest rank in its best round, so that a good node beside a bad one is not blamed. An all-reduce of all follows.
Rank 0 prints ``ok NODE`` or ``bad NODE: reason`` per node; the exit status is 0 or 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_NUM_ROUNDS = 3
_SLOW_SHARE = 0.25
"""Of the median node's rate, below which a node is bad: links differ by less than a factor of two where they work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Where this process is."""

    rank: int
    world_size: int
    per_node: int
    nodes: tuple[str, ...]
    """In the order of the ranks."""

    def node_of(self, rank: int) -> str:
        """The node that a rank runs on."""
        return self.nodes[rank // self.per_node]


def pairings(num_nodes: int, num_rounds: int) -> list[dict[int, int]]:
    """Partners of the nodes by round, everyone with another one each time; one of an odd number sits out.

    The circle method of round-robin tournaments.
    """
    size = num_nodes + num_nodes % 2
    rounds = []
    for turn in range(min(num_rounds, size - 1) if num_nodes > 1 else 0):
        order = [0, *((turn + place) % (size - 1) + 1 for place in range(size - 1))]
        couples = [(order[place], order[-1 - place]) for place in range(size // 2)]
        partners = dict(couples) | {b: a for a, b in couples}
        rounds.append({a: b for a, b in partners.items() if max(a, b) < num_nodes})
    return rounds


def slow_nodes(rates: Mapping[str, float], min_gb_per_second: float) -> dict[str, str]:
    """What is wrong with nodes of these rates in GB/s, by node."""
    usual = statistics.median(rates.values())
    problems = {}
    for node, rate in rates.items():
        if rate < min_gb_per_second:
            problems[node] = f"exchanges {rate:.3g} GB/s, less than {min_gb_per_second:g}"
        elif rate < _SLOW_SHARE * usual:
            problems[node] = f"exchanges {rate:.3g} GB/s, the median node {usual:.3g}"
    return {node: f"{text}; check its links and adapters" for node, text in problems.items()}


def measure(place: RankPlace, num_bytes: int, timeout_seconds: float, min_gb_per_second: float) -> list[str]:
    """Lines about every node on rank 0, nothing elsewhere.

    Args:
        place: of this process.
        num_bytes: of a message.
        timeout_seconds: for the others to come.
        min_gb_per_second: what a node must reach.
    """
    import torch
    import torch.distributed as dist

    # The others hear of rank 0's list only when it has waited long enough.
    timeout = timedelta(seconds=timeout_seconds if place.rank == 0 else 2 * timeout_seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address, port, is_master=place.rank == 0, timeout=timeout, wait_for_workers=False
    )
    absent = _absent(place, store, timeout_seconds)
    if absent:
        return [
            f"bad {node}: did not come to the all-reduce within {timeout_seconds:g} s; check its network"
            if node in absent
            else f"ok {node}"
            for node in place.nodes
            if place.rank == 0
        ]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(place.rank % place.per_node % torch.cuda.device_count())
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    rounds = pairings(len(place.nodes), _NUM_ROUNDS)
    own = max((_exchange_rate(place, partners, num_bytes) for partners in rounds), default=0.0)
    found: list[float] = [0.0] * place.world_size
    dist.all_gather_object(found, own)
    together = _all_reduce_rate(place.world_size, num_bytes)
    dist.destroy_process_group()
    if place.rank != 0:
        return []
    rates = {
        node: min(found[number * place.per_node : (number + 1) * place.per_node])
        for number, node in enumerate(place.nodes)
    }
    problems = slow_nodes(rates, min_gb_per_second) if len(rates) > 1 else {}
    lines = [f"bad {node}: {problems[node]}" if node in problems else f"ok {node}" for node in rates]
    return [
        *lines,
        f"all-reduce {together:.3g} GB/s; " + ", ".join(f"{node} {rate:.3g}" for node, rate in rates.items()),
    ]


def _absent(place: RankPlace, store: Any, timeout_seconds: float) -> set[str]:
    """Nodes whose ranks do not come, the same answer everywhere; rank 0's own where it alone is there."""
    store.set(f"here/{place.rank}", "")
    if place.rank == 0:
        deadline = time.monotonic() + timeout_seconds
        absent = set()
        for rank in range(place.world_size):
            try:
                store.wait([f"here/{rank}"], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
            except RuntimeError:
                absent.add(place.node_of(rank))
        if len(absent) > 1 and len(absent) == len(place.nodes) - 1:
            absent = {place.nodes[0]}
        store.set("absent", json.dumps(sorted(absent)))
        if absent:
            time.sleep(1.0)  # the others ask for it, and the store goes with this process
        return absent
    return set(json.loads(store.get("absent")))


def _exchange_rate(place: RankPlace, partners: Mapping[int, int], num_bytes: int) -> float:
    """GB/s of this rank and one of another node in both directions at once; 0 without a partner."""
    import torch
    import torch.distributed as dist

    node, local = divmod(place.rank, place.per_node)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sent, received = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    rate = 0.0
    for _ in range(2):  # the first makes the connection
        dist.barrier()
        if node in partners:
            peer = partners[node] * place.per_node + local
            start = time.perf_counter()
            pair = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(pair):
                work.wait()
            if device == "cuda":
                torch.cuda.synchronize()
            rate = num_bytes / 1e9 / (time.perf_counter() - start)
    return rate


def _all_reduce_rate(world_size: int, num_bytes: int) -> float:
    """GB/s that every rank sends in a ring all-reduce of all of them."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.ones(num_bytes // 4, device=device)
    seconds = 1.0
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return 2 * (world_size - 1) / world_size * num_bytes / 1e9 / seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures as one of the ranks that the environment tells of."""
    parser = argparse.ArgumentParser(description="measures how fast nodes exchange data")
    parser.add_argument("--nodes", required=True, help="names in the order of the ranks: n1,n2")
    parser.add_argument("--mib", type=int, default=256, help="size of a message")
    parser.add_argument("--timeout-seconds", type=float, default=120.0)
    parser.add_argument("--min-gb-per-second", type=float, default=0.0, help="what a node must reach")
    options = parser.parse_args(arguments)
    place = RankPlace(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        per_node=int(os.environ["LOCAL_WORLD_SIZE"]),
        nodes=tuple(options.nodes.split(",")),
    )
    try:
        lines = measure(place, options.mib << 20, options.timeout_seconds, options.min_gb_per_second)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        print(f"rank {place.rank} on {place.node_of(place.rank)}: {text}", file=sys.stderr, flush=True)
        return 1
    print("\n".join(lines), end="\n" if lines else "", flush=True)
    return int(any(line.startswith("bad ") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
