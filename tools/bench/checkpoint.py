"""Times saving and loading a training state, ours beside what Megatron-Core and torch offer.

Two data-parallel ranks with the distributed optimizer, float32, a random model; each variant is a pair of processes of
its own, variants in turn, the fastest of `--repeats` counts. `blocked` is how long training stands still, `saved` until
everything is on disk, `check` reads it all and compares, `load` reads it into a fresh model at the same layout.
`torch.save` (every rank pickles its weights and optimizer) is the floor: no other layout reads it, nothing is synced,
checked or committed. Prints a table and writes build/bench/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import BUILD, Row, machine, resident_bytes, write_result
from rich.console import Console
from rich.table import Table

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import (
    CheckpointSection,
    MicroBatchSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
)
from megatron_prime.mcore.checkpoint.checkpointer import Checkpointer
from megatron_prime.mcore.checkpoint.resume import find_checkpoint, identity_of
from megatron_prime.mcore.cpu import megatron_platform
from megatron_prime.mcore.losses import SftTokenLoss
from megatron_prime.mcore.packing import TokenRows
from megatron_prime.mcore.parallel import Layout, parallel_layout
from megatron_prime.mcore.role import RoleSetup, TrainableRole
from megatron_prime.weights.architecture import read_architecture

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "max_position_embeddings": 1024,
    "num_attention_heads": 12,
    "num_hidden_layers": 10,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 32000,
}
PARALLEL = ParallelSection(world_size=2, use_distributed_optimizer=True)
VARIANTS = {
    "ours": "asynchronous",
    "ours, synchronous": "checkpoint.asynchronous: false",
    "Megatron dp_reshardable": "dist_checkpointing.save, forked writers; same layout only",
    "torch.save per rank": "no fsync, no check; same layout only",
}


def build_role(folder: Path, layout: Layout) -> TrainableRole:
    """A random model that has made a step."""
    setup = RoleSetup(
        architecture=read_architecture(folder),
        model=ModelSection(path=str(folder), init="random"),
        parallel=PARALLEL,
        micro_batch=MicroBatchSection(micro_batch_size=1),
        layout=layout,
    )
    role = TrainableRole(setup, OptimizerSection(lr=1e-4), num_optimizer_steps=10)
    examples = [SftExample(prompt_token_ids=(5, 6), response_token_ids=(7, 8, 9))] * 2
    rows = TokenRows.from_examples(examples)
    role.optimizer_step(rows, range(2), SftTokenLoss(num_tokens=1))
    return role


def timed(work: Callable[[], object]) -> float:
    """Seconds until all ranks are through."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def ours(asynchronous: bool, place: Path, folder: Path, layout: Layout) -> Row:
    role = build_role(folder, layout)
    section = CheckpointSection(asynchronous=asynchronous)
    saver = Checkpointer(place, {"model": role}, section, {"model": str(folder)}, None)
    before = resident_bytes()
    blocked = timed(lambda: saver.save(1, {}))
    copied = resident_bytes() - before if asynchronous else 0
    rest = timed(saver.finish)
    fresh = build_role(folder, layout)
    found: list[Path | None] = []
    identity = identity_of({"model": role.architecture}, role.setup.model.dtype)
    checked = timed(lambda: found.append(find_checkpoint(place, identity)))
    load = timed(Checkpointer(place, {"model": fresh}, section, {"model": str(folder)}, found[0]).restore)
    return {"blocked": blocked, "saved": blocked + rest, "load": load, "check": checked, "copied": copied}


def megatron(place: Path, folder: Path, layout: Layout) -> Row:
    from megatron.core import dist_checkpointing

    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}

    def state_of(role: TrainableRole, loading: bool) -> dict[str, Any]:
        options = dict(metadata)
        model = role.chunks[0].sharded_state_dict(metadata=options)
        optimizer = role.optimizer.sharded_state_dict(model, is_loading=loading, metadata=options)
        return {"model": model, "optimizer": optimizer}

    role = build_role(folder, layout)
    if layout.dp_rank == 0:
        (place / "megatron").mkdir()
    with megatron_platform():
        saved = timed(lambda: dist_checkpointing.save(state_of(role, False), str(place / "megatron")))
        fresh = build_role(folder, layout)

        @torch.no_grad()
        def load() -> None:
            loaded: Any = dist_checkpointing.load(state_of(fresh, True), str(place / "megatron"))
            fresh.chunks[0].load_state_dict(loaded["model"])
            fresh.optimizer.load_state_dict(loaded["optimizer"])

        return {"blocked": saved, "saved": saved, "load": timed(load)}


def plain(place: Path, folder: Path, layout: Layout) -> Row:
    role = build_role(folder, layout)
    path = place / f"{layout.dp_rank}.pt"

    def state_of(role: TrainableRole) -> list[Any]:
        return [
            role.chunks[0].state_dict(),
            [inner.optimizer.state_dict() for inner in role.optimizer.chained_optimizers],
        ]

    saved = timed(lambda: torch.save(state_of(role), path))
    fresh = build_role(folder, layout)

    def load() -> None:
        weights, optimizers = torch.load(path, weights_only=False)
        fresh.chunks[0].load_state_dict(weights)
        for inner, state in zip(fresh.optimizer.chained_optimizers, optimizers, strict=True):
            inner.optimizer.load_state_dict(state)

    return {"blocked": saved, "saved": saved, "load": timed(load)}


def worker(variant: str, place: Path, folder: Path) -> None:
    """Measures one variant on this rank; the first one prints the row."""
    torch.set_num_threads(1)
    with parallel_layout(PARALLEL, seed=1) as layout:
        if variant == "torch.save per rank":
            row = plain(place, folder, layout)
        elif variant == "Megatron dp_reshardable":
            row = megatron(place, folder, layout)
        else:
            row = ours(variant == "ours", place, folder, layout)
        if layout.dp_rank == 0:
            print(json.dumps(row))


def measure(variant: str, folder: Path) -> Row:
    """One pair of processes."""
    place = BUILD / "checkpoint" / "files"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--worker", variant, "--place", str(place), "--model", str(folder)]
    environments = [shared | {"RANK": rank} for rank in ("0", "1")]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
    texts = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{variant} failed")
    row = json.loads(texts[0].splitlines()[-1])
    row["bytes"] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    shutil.rmtree(place)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker, options.place, options.model)
        return 0
    folder = BUILD / "checkpoint" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rows: dict[str, list[Row]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            rows[variant].append(measure(variant, folder))
    table = Table("variant", "blocked s", "saved s", "load s", "check s", "GB", "copy GB", "")
    results = []
    for variant, found in rows.items():
        best = {key: min(row[key] for row in found) for key in found[0]}
        cells = [f"{best[key]:.2f}" if key in best else "" for key in ("blocked", "saved", "load", "check")]
        sizes = [f"{best[key] / 1e9:.2f}" if best.get(key) else "" for key in ("bytes", "copied")]
        table.add_row(variant, *cells, *sizes, VARIANTS[variant])
        results.append({"variant": variant, "seconds": best["saved"], **best})
    Console(width=140).print(table)
    write_result("checkpoint", machine(), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
