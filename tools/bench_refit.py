"""Times putting a model's weights from trainer processes into a real vLLM engine, beside the simple ways of doing it.

The model has the shape of Qwen2.5-0.5B in bfloat16 (about 1 GB), random. Trainer layouts TP1, TP2 and PP2 over gloo,
engines of one and two workers, all on this machine's CPU. A refit counts from the trainer's finished weights to the
engine's readiness to sample with them. `ours` is what a run does: finiteness checked, checksums compared, every
parameter of the engine verified. Prints a table and writes build/bench/refit.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_prime.config.schema import VllmSection
from megatron_prime.engines import vllm_setup
from megatron_prime.rollout.vllm.engine import VllmEngine
from megatron_prime.rollout.vllm.process import engine_environment
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.layouts import local_slice
from megatron_prime.weights.stream import ParallelGroups, WeightExport

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}
BUCKET_BYTES = 64 << 20
Row = dict[str, Any]


def write_folder(folder: Path) -> None:
    """A random model of CONFIG's shape."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(shape) * 0.02).bfloat16()
        for spec in weight_specs(read_architecture(folder))
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }
    save_file(tensors, folder / "model.safetensors")


def section(num_workers: int, pack: bool, verify: bool) -> VllmSection:
    return VllmSection(
        tensor_parallel_size=num_workers,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_gib=0.125,
        num_threads=1,
        pack_weights=pack,
        verify_refit=verify,
    )


class Place:
    """Where a bench rank stands (the part of `mcore.parallel.Layout` that an engine's setup reads)."""

    def __init__(self, rank: int, tp_size: int, pp_size: int) -> None:
        self.tp_rank, self.tp_size = rank % tp_size, tp_size
        self.pp_rank, self.pp_size = rank // tp_size, pp_size
        self.copy_index, self.num_copies = 0, 1

    def export_groups(self) -> ParallelGroups:
        """The groups over which the model's weights are gathered."""
        return ParallelGroups(
            tp_group=dist.group.WORLD if self.tp_size > 1 else None,
            pp_group=dist.group.WORLD if self.pp_size > 1 else None,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
        )


def shards_of(folder: Path, place: Place) -> dict[str, torch.Tensor]:
    """This rank's shards as a trainer holds them."""
    architecture, opened = read_architecture(folder), HfFolder(folder)
    local = {}
    for spec in weight_specs(architecture):
        last = place.pp_size - 1
        stage = (
            spec.layer * place.pp_size // architecture.num_layers
            if spec.layer is not None
            else 0
            if "embedding" in spec.megatron_name
            else last
        )
        if stage == place.pp_rank:
            shard = local_slice(
                spec,
                architecture,
                opened.fetch,
                tp_rank=place.tp_rank,
                tp_size=place.tp_size,
                padded_vocab_size=architecture.padded_vocab_size(128, place.tp_size),
            )
            local[spec.megatron_name] = shard.clone()
    return local


def export_of(folder: Path, place: Place) -> WeightExport:
    """This rank's shards on their way out."""
    architecture, local = read_architecture(folder), shards_of(folder, place)
    return WeightExport(weight_specs(architecture), architecture, lambda: local, place.export_groups())


def reset_peak(process_id: int | str) -> None:
    Path(f"/proc/{process_id}/clear_refs").write_text("5")


def peak_gb(process_id: int | str) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def trainer_rank(
    rank: int, sizes: tuple[int, int], folder: Path, port: int, settings: VllmSection, repeats: int, results: Any
) -> None:
    """One rank that refits an engine several times; the first one reports."""
    torch.set_num_threads(1)
    world_size = sizes[0] * sizes[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    place = Place(rank, *sizes)
    weights = export_of(folder, place)
    setup = vllm_setup(
        str(folder),
        "bfloat16",
        settings,
        read_architecture(folder),
        place,  # type: ignore[arg-type]
        1,
        end_token_ids=(0,),
        decode=str,
    )
    engine = VllmEngine(setup)
    begun = time.perf_counter()
    engine.prepare(weights)
    first_plan = time.perf_counter() - begun
    engine.load_weights(weights, 0)
    reset_peak("self")
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
            {
                "seconds": min(seconds),
                "median_seconds": sorted(seconds)[len(seconds) // 2],
                "first_plan_seconds": first_plan,
                "plan_seconds": min(planning),
                "trainer_peak_gb": peak_gb("self"),
                "engine_peak_gb": peak_gb(process),
            }
        )
    engine.close()
    dist.destroy_process_group()


def bench_ours(folder: Path, layout: str, settings: VllmSection, repeats: int, port: int) -> Row:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    sizes = LAYOUTS[layout]
    ranks = [
        context.Process(target=trainer_rank, args=(rank, sizes, folder, port, settings, repeats, results))
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
                raise SystemExit(f"bench_refit: a rank of {layout} failed; its traceback is above") from None
    for process in ranks:
        process.join()
    return row


def buckets(named: list[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Tensors in groups of about BUCKET_BYTES, the same ones on both sides."""
    bucket: list[tuple[str, torch.Tensor]] = []
    for item in named:
        bucket.append(item)
        if sum(t.nbytes for _, t in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def simple_engine(connection: Connection, folder: Path, port: int) -> None:
    """A vLLM engine that is refitted in the simple ways, without any check."""
    os.environ |= engine_environment(on_gpu=False)
    torch.set_num_threads(1)
    setup = vllm_setup(
        str(folder), "bfloat16", section(1, False, False), read_architecture(folder), None, 1,
        end_token_ids=(0,), decode=str,
    )  # fmt: skip
    from megatron_prime.rollout.vllm.server import build

    llm = build(setup.options)
    model = llm.collective_rpc(lambda worker: worker.model_runner.get_model())[0]
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=60))
    meta = list(FolderExport(HfFolder(folder), read_architecture(folder), torch.bfloat16))
    connection.send(os.getpid())
    while True:
        kind, payload = connection.recv()
        with torch.no_grad():
            if kind == "file":
                with safe_open(payload, "pt") as opened:
                    model.load_weights((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
            elif kind == "pickled":
                model.load_weights(iter(pickle.loads(payload).items()))
            elif kind == "gloo":
                model.load_weights(received(meta, group))
            else:
                return
        llm.reset_prefix_cache()
        connection.send("done")


def received(meta: list[tuple[str, torch.Tensor]], group: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as a gloo broadcast brings them."""
    for bucket in buckets(meta):
        flat = torch.empty(sum(t.numel() for _, t in bucket), dtype=torch.bfloat16)
        group.broadcast([flat], dist.BroadcastOptions()).wait()
        for (name, tensor), part in zip(bucket, flat.split([t.numel() for _, t in bucket]), strict=True):
            yield name, part.view(tensor.shape)


def bench_simple(folder: Path, repeats: int, port: int) -> list[Row]:
    """The simple ways, one trainer process and one engine process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    process = context.Process(target=simple_engine, args=(theirs, folder, port))
    process.start()
    group = dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=60))
    engine_id = ours.recv()
    weights = {
        name: tensor.clone()
        for name, tensor in FolderExport(HfFolder(folder), read_architecture(folder), torch.bfloat16)
    }

    def by_file() -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            save_file(weights, f"{scratch}/weights.safetensors")
            ours.send(("file", f"{scratch}/weights.safetensors"))
            ours.recv()

    def pickled() -> None:
        ours.send(("pickled", pickle.dumps(weights)))
        ours.recv()

    def by_gloo() -> None:
        ours.send(("gloo", None))
        for bucket in buckets(list(weights.items())):
            flat = torch.cat([tensor.view(-1) for _, tensor in bucket])
            group.broadcast([flat], dist.BroadcastOptions()).wait()
        ours.recv()

    rows = []
    ways: dict[str, Callable[[], None]] = {"save_file + load": by_file, "gloo broadcast": by_gloo, "pickled": pickled}
    for name, way in ways.items():
        way()
        reset_peak("self")
        reset_peak(engine_id)
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - begun)
        rows.append(
            {
                "variant": name,
                "seconds": min(seconds),
                "median_seconds": sorted(seconds)[len(seconds) // 2],
                "trainer_peak_gb": peak_gb("self"),
                "engine_peak_gb": peak_gb(engine_id),
            }
        )
    ours.send(("end", None))
    process.join()
    return rows


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer for a quick look")
    options = parser.parse_args()
    CONFIG["num_hidden_layers"] = options.layers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_folder(folder)
        num_bytes = (folder / "model.safetensors").stat().st_size
        floor = memcpy_seconds(num_bytes)
        rows = [{"variant": "memcpy, one thread", "seconds": floor}]
        port = 29700 + os.getpid() % 200
        rows += [row | {"layout": "TP1 -> 1"} for row in bench_simple(folder, options.repeats, port)]
        plans = [("ours", "TP1", 1, False, True), ("ours, no checksums", "TP1", 1, False, False)]
        plans += [("ours", layout, workers, False, True) for layout, workers in (("TP2", 1), ("PP2", 1), ("TP2", 2))]
        plans += [("ours, repacking", layout, 1, True, True) for layout in ("TP1", "TP2")]
        for number, (variant, layout, workers, pack, verify) in enumerate(plans, start=1):
            row = bench_ours(folder, layout, section(workers, pack, verify), options.repeats, port + number)
            rows.append({"variant": variant, "layout": f"{layout} -> {workers}"} | row)
    by_file = next(row["seconds"] for row in rows if row["variant"] == "save_file + load")
    print(f"{'variant':22}{'layout':12}{'s':>8}{'GB/s':>8}{'of memcpy':>11}{'vs file':>9}{'plan ms':>9}{'GB t/e':>12}")
    for row in rows:
        row["gb_per_second"] = num_bytes / 1e9 / row["seconds"]
        row["share_of_memcpy"] = floor / row["seconds"]
        row["speedup_over_save_file"] = by_file / row["seconds"]
        peaks = f"{row.get('trainer_peak_gb', 0):.1f}/{row.get('engine_peak_gb', 0):.1f}"
        print(
            f"{row['variant']:22}{row.get('layout', ''):12}{row['seconds']:8.3f}{row['gb_per_second']:8.2f}"
            f"{row['share_of_memcpy']:10.0%} {row['speedup_over_save_file']:8.2f}"
            f"{1e3 * row.get('plan_seconds', 0):9.2f}{peaks:>12}"
        )
    output = Path("build/bench/refit.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    output.write_text(json.dumps({"machine": machine, "bytes": num_bytes, "rows": rows}, indent=1))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
