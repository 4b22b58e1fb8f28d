"""Times putting a model's weights from trainer processes into a real vLLM engine, beside the simple ways of doing it.

The model has the shape of Qwen2.5-0.5B in bfloat16 (about 1 GB), random. Trainer layouts TP1, TP2 and PP2 over gloo,
engines of one and two workers, all on this machine's CPU. A refit counts from the trainer's finished weights to the
engine's readiness to sample with them. `ours` is what a run does: finiteness checked, checksums compared, every
parameter of the engine verified. It is compared with a file (in memory) of the same layout: shards gathered on one
rank, save_file, every worker loads. Prints a table and writes build/bench/refit.json.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common.engine_setup import engine_setup
from common.half_billion import CONFIG, TINY_CONFIG, write_folder
from common.measuring import Row, bench_parser, machine, reset_peak, write_result
from common.refit_setup import peak_gb, section, timings, trainer_place
from common.refit_simple_ways import FILE, bench_simple, file_rank

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside

LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}


def trainer_rank(
    rank: int, sizes: tuple[int, int], folder: Path, port: int, settings: VllmSection, repeats: int, results: Any
) -> None:
    """One rank that refits an engine several times; the first one reports."""
    place, weights = trainer_place(rank, sizes, folder, port)
    engine = VllmBeside(engine_setup(folder, settings, dtype="bfloat16", place=place))
    begun = time.perf_counter()
    engine.prepare(weights)
    first_plan = time.perf_counter() - begun
    engine.load_weights(weights, 0)
    reset_peak()
    if (process := engine.process_id()) is not None:
        reset_peak(process)
    seconds, planning = [], []
    for version in range(1, repeats + 1):
        dist.barrier()
        begun = time.perf_counter()
        weights.tensors()
        engine.prepare(weights)
        planning.append(time.perf_counter() - begun)
        engine.load_weights(weights, version)
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        assert process is not None
        results.put(
            timings(seconds)
            | {
                "first_plan_seconds": first_plan,
                "plan_seconds": min(planning),
                "trainer_peak_gb": peak_gb(),
                "engine_peak_gb": peak_gb(process),
            }
        )
    engine.close()
    dist.destroy_process_group()


def bench_ranks(
    target: Callable[..., None], folder: Path, layout: str, settings: VllmSection, repeats: int, port: int
) -> Row:
    """What the first of a layout's ranks has measured."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    sizes = LAYOUTS[layout]
    ranks = [
        context.Process(target=target, args=(rank, sizes, folder, port, settings, repeats, results))
        for rank in range(sizes[0] * sizes[1])
    ]
    for process in ranks:
        process.start()
    while True:
        try:
            row = results.get(timeout=1)
            break
        except queue.Empty:
            if any(process.exitcode for process in ranks):
                raise SystemExit(f"refit: a rank of {layout} failed; its traceback is above") from None
    for process in ranks:
        process.join()
    return row


def memcpy_seconds(num_bytes: int) -> float:
    """Best of five copies of as many bytes by one thread."""
    torch.set_num_threads(1)
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begun)
    return best


def main() -> None:
    """Runs everything and writes the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer for a quick look")
    options = parser.parse_args()
    config = TINY_CONFIG if options.tiny else CONFIG | {"num_hidden_layers": options.layers}
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_folder(folder, config)
        num_bytes = (folder / "model.safetensors").stat().st_size
        floor = memcpy_seconds(num_bytes)
        rows = [{"variant": "memcpy, one thread", "seconds": floor}]
        port = 29700 + os.getpid() % 200
        rows += [row | {"layout": "TP1 -> 1"} for row in bench_simple(folder, repeats, port)]
        # One after the other what is compared: the machine's speed changes with its neighbours.
        plans = [
            (variant, layout, workers, False, variant == "ours")
            for layout, workers in (("TP2", 1), ("PP2", 1), ("TP1", 2), ("TP2", 2), ("PP2", 2))
            for variant in (FILE, "ours")
        ]
        plans.insert(0, ("ours", "TP1", 1, False, True))  # its file is one of the simple ways
        plans.append(("ours, no checksums", "TP1", 1, False, False))
        plans += [("ours, repacking", layout, 1, True, True) for layout in ("TP1", "TP2")]
        if options.tiny:
            plans = plans[:1]
        for number, (variant, layout, workers, pack, verify) in enumerate(plans, start=1):
            target = file_rank if variant == FILE else trainer_rank
            settings = section(workers, pack, verify)
            row = bench_ranks(target, folder, layout, settings, repeats, port + number)
            rows.append({"variant": variant, "layout": f"{layout} -> {workers}"} | row)
    by_file = {row["layout"]: row["seconds"] for row in rows if row["variant"] == FILE}
    print(f"{'variant':22}{'layout':12}{'s':>8}{'GB/s':>8}{'of memcpy':>11}{'vs file':>9}{'plan ms':>9}{'GB t/e':>12}")
    for row in rows:
        row["gb_per_second"] = num_bytes / 1e9 / row["seconds"]
        row["share_of_memcpy"] = floor / row["seconds"]
        if "repacking" not in row["variant"]:  # no file was loaded that way
            row["speedup_over_save_file"] = by_file[row.get("layout", "TP1 -> 1")] / row["seconds"]
        peaks = f"{row.get('trainer_peak_gb', 0):.1f}/{row.get('engine_peak_gb', 0):.1f}"
        print(
            f"{row['variant']:22}{row.get('layout', ''):12}{row['seconds']:8.3f}{row['gb_per_second']:8.2f}"
            f"{row['share_of_memcpy']:10.0%} {row.get('speedup_over_save_file', float('nan')):8.2f}"
            f"{1e3 * row.get('plan_seconds', 0):9.2f}{peaks:>12}"
        )
    write_result("refit", machine(), rows, options, bytes=num_bytes)


if __name__ == "__main__":
    main()
