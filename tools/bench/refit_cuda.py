"""Times putting a model's weights from a GPU trainer into another process on the same GPU, beside the simple ways.

The model has the shape of Qwen2.5-0.5B in bfloat16 (about 1 GB), random. The receiver stands in for an engine: it has a
parameter for every tensor and copies into it what comes, as vLLM's loaders do. `ours` is what a run does with
`rollout.vllm.transfer: ipc`: the export stream packed into two buckets of CUDA memory, checksums of the trainer's
tensors compared with the receiver's parameters. Where vLLM is installed a real engine is timed too, where there are
two GPUs also NCCL between them. Prints a table and writes build/bench/refit_cuda.json; exits with status 77 where
there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common.engine_setup import engine_setup
from common.half_billion import CONFIG, TINY_CONFIG, write_folder
from common.measuring import Row, bench_parser, exit_without_gpu, write_result
from common.refit_setup import section, shards_of
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_prime.interfaces import RankPlace
from megatron_prime.rollout.vllm.engines import engine_beside
from megatron_prime.rollout.vllm.trainer.base import VllmEngine
from megatron_prime.rollout.vllm.trainer.process import EngineParent
from megatron_prime.rollout.vllm.trainer.weight_writer import WeightWriter
from megatron_prime.rollout.vllm.wire.broadcast import Group
from megatron_prime.rollout.vllm.wire.buckets import BucketReceiver, BucketSender, Channel
from megatron_prime.rollout.vllm.wire.ipc import BucketReader, SharedBuckets
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, lay_out, whole_tensors
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.digests import digest, digest_on
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.shards import cut
from megatron_prime.weights.stream import ParallelGroups, WeightExport

TIMEOUT_SECONDS = 60.0


class StandIn:
    """A process with a parameter for every tensor."""

    def __init__(self, plan: SharedPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.parameters = {
            entry.name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype), device=device)
            for entry in plan.entries
        }
        self._receivers: dict[str, tuple[Channel, BucketReceiver]] = {}

    def serve(self, connection: Connection) -> None:
        """Takes weights in the way that each message names until the connection ends."""
        connection.send("ready")
        while True:
            try:
                way, *what = connection.recv()
            except EOFError:
                return
            getattr(self, way)(*what)
            synchronize(self.device)
            connection.send("done")

    def buckets(
        self, key: str, meet: Callable[[torch.device], Channel], bucket_bytes: int, first: int, check: bool
    ) -> None:
        """Weights that come through a channel, made at its first use."""
        if key not in self._receivers:
            channel = meet(self.device)
            receiver = BucketReceiver(self.plan, channel, bucket_bytes, self.device, keeps_all=False)
            self._receivers[key] = channel, receiver
        channel, receiver = self._receivers[key]
        if isinstance(channel, BucketReader):
            channel.start(first)
        for batch in receiver:
            self._load(batch)
        if check:
            found = b"".join(digest_on(self.device, parameter) for parameter in self.parameters.values())
            assert found == receiver.digests.cpu().numpy().tobytes(), "a parameter is not what was sent"

    def memory(self, path: str, plan: SharedPlan) -> None:
        """Weights in host memory that the trainer writes."""
        weights = SharedWeights(plan, path, writable=False)
        for number, item in enumerate(weights.tensors.items(), start=1):
            weights.wait(number, TIMEOUT_SECONDS)
            self._load([item])
        found = [digest(cut(self.parameters[name], ranges)) for name, ranges in plan.slices]
        weights.wait(len(plan.entries) + 1, TIMEOUT_SECONDS)
        assert found == [row.tobytes() for row in weights.digests.numpy()], "a parameter is not what was sent"

    def pickled(self, data: bytes) -> None:
        """Weights in the message itself."""
        self._load(list(pickle.loads(data).items()))

    def file(self, path: str) -> None:
        """Weights in a safetensors file."""
        with safe_open(path, "pt", device=str(self.device)) as opened:
            self._load([(name, opened.get_tensor(name)) for name in opened.keys()])  # noqa: SIM118

    def _load(self, batch: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in batch:
            self.parameters[name].copy_(tensor)


def open_reader(offer: Any, device: torch.device) -> Channel:
    """The stand-in's end of shared buckets."""
    return BucketReader(offer, 0, TIMEOUT_SECONDS)


def meet_by_nccl(port: int, device: torch.device) -> Channel:
    """The stand-in's end of a broadcast."""
    return Group("nccl", "127.0.0.1", port, 1, 2, TIMEOUT_SECONDS, device)


def stand_in(connection: Connection, plan: SharedPlan, device: torch.device) -> None:
    """What the other process runs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    StandIn(plan, device).serve(connection)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The trainer's process: times ways of sending, all with the same weights and the same other process."""

    def __init__(self, weights: WeightExport, device: torch.device, repeats: int) -> None:
        self.weights = weights
        self.device = device
        self.repeats = repeats
        self.plan = whole_tensors(lay_out(weights.tensors()))
        self.rows: list[Row] = []

    def time(self, variant: str, way: Callable[[], None]) -> None:
        """Best and median of some refits after the first, and the GPU memory they took beyond what was there."""
        way()
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.repeats):
            synchronize(self.device)
            begun = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        self.rows.append(
            {
                "variant": variant,
                "seconds": min(seconds),
                "median_seconds": sorted(seconds)[len(seconds) // 2],
                "extra_gpu_gb": peak / 1e9,
            }
        )

    def through_buckets(self, connection: Connection, bucket_mib: int, with_digests: bool) -> Callable[[], None]:
        """Our transfer `ipc`."""
        bucket_bytes = bucket_mib << 20
        channel = SharedBuckets(bucket_bytes, 1, self.device, TIMEOUT_SECONDS, lambda: connection.poll(0))
        sender = BucketSender(self.plan, channel, channel.buckets, with_digests=with_digests)
        key = f"{bucket_mib} {with_digests}"

        def way() -> None:
            meet = partial(open_reader, channel.offer)
            connection.send(("buckets", key, meet, bucket_bytes, channel.num_filled, with_digests))
            sender.send(self.weights)
            connection.recv()

        return way

    def by_nccl(self, connection: Connection) -> Callable[[], None]:
        """Our transfer `nccl`, to another GPU."""
        port, bucket_bytes = 29500 + os.getpid() % 400, 64 << 20
        ends: list[BucketSender] = []

        def way() -> None:
            connection.send(("buckets", "nccl", partial(meet_by_nccl, port), bucket_bytes, 0, True))
            if not ends:
                group = Group("nccl", "127.0.0.1", port, 0, 2, TIMEOUT_SECONDS, self.device)
                buckets = torch.empty(2, bucket_bytes, dtype=torch.uint8, device=self.device).unbind()
                ends.append(BucketSender(self.plan, group, buckets, with_digests=True))
            ends[0].send(self.weights)
            connection.recv()

        return way

    def through_memory(self, connection: Connection) -> Callable[[], None]:
        """Our transfer `shared_memory`."""
        writer = WeightWriter(self.weights, section(1, False, True), is_leader=True)

        def way() -> None:
            writer.begin(self.weights)
            connection.send(("memory", writer.path, writer.plan))
            writer.write(self.weights)
            connection.recv()

        return way

    def pickled(self, connection: Connection) -> None:
        """All tensors in one message."""
        connection.send(("pickled", pickle.dumps({name: tensor.cpu() for name, tensor in self.weights})))
        connection.recv()

    def by_file(self, connection: Connection) -> None:
        """All tensors in a file in memory."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            path = f"{scratch}/weights.safetensors"
            save_file({name: tensor.cpu() for name, tensor in self.weights}, path)
            connection.send(("file", path))
            connection.recv()

    def copied(self) -> Callable[[], None]:
        """As many bytes from memory to memory of one device."""
        source, target = (torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device) for _ in range(2))

        def way() -> None:
            target.copy_(source)
            synchronize(self.device)

        return way

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.plan.entries)


def started(plan: SharedPlan, device: torch.device) -> Connection:
    """A stand-in in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=stand_in, args=(theirs, plan, device), daemon=True).start()
    theirs.close()
    assert ours.recv() == "ready"
    return ours


def bench_vllm(bench: Bench, folder: Path) -> None:
    """A real engine, by both of our transfers."""
    place = RankPlace(device=bench.device)
    parent = EngineParent(1, (0,) if bench.device.type == "cuda" else (), TIMEOUT_SECONDS)
    for transfer in ("ipc", "shared_memory"):
        settings = replace(section(1, False, True), transfer=transfer)
        setup = engine_setup(folder, settings, dtype="bfloat16", place=place)
        with closing(engine_beside(setup, parent)) as engine:
            bench.time(f"vLLM, ours, {transfer}", partial(refit, engine, bench.weights))
    parent.close()


def refit(engine: VllmEngine, weights: WeightExport) -> None:
    """The next version."""
    engine.load_weights(weights, engine.weight_version + 1)


def main() -> None:
    """Runs everything and writes the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--host", action="store_true", help="host memory in place of a GPU's: shows that it runs")
    options = parser.parse_args()
    if not options.host and not torch.cuda.is_available():
        exit_without_gpu()
    device = torch.device("cpu") if options.host else torch.device("cuda", 0)
    machine = f"CPU, torch {torch.__version__}" if options.host else torch.cuda.get_device_name(0)
    print(f"{machine}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_folder(folder, TINY_CONFIG if options.tiny else CONFIG)
        architecture = read_architecture(folder)
        local = {name: tensor.to(device) for name, tensor in shards_of(folder, ParallelGroups()).items()}
        weights = WeightExport(weight_specs(architecture), architecture, lambda: local, ParallelGroups())
        bench = Bench(weights, device, 1 if options.tiny else options.repeats)
        bench.time("device memory to memory", bench.copied())
        with closing(started(bench.plan, device)) as other:
            bench.time("save_file + load", lambda: bench.by_file(other))
            bench.time("pickled tensors", lambda: bench.pickled(other))
            bench.time("ours, shared_memory", bench.through_memory(other))
            bench.time("ours", bench.through_buckets(other, 64, True))
            bench.time("ours, no checksums", bench.through_buckets(other, 64, False))
            for bucket_mib in (16, 256):
                bench.time(f"ours, {bucket_mib} MiB buckets", bench.through_buckets(other, bucket_mib, True))
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            with closing(started(bench.plan, torch.device("cuda", 1))) as other:
                bench.time("ours, NCCL to GPU 1", bench.by_nccl(other))
        if importlib.util.find_spec("vllm") is not None:
            bench_vllm(bench, folder)
    report(bench, machine, options)


def report(bench: Bench, machine: str, options: argparse.Namespace) -> None:
    """Prints the table and writes the file."""
    by_file = next(row["seconds"] for row in bench.rows if row["variant"] == "save_file + load")
    print(f"{'variant':26}{'s':>9}{'median':>9}{'GB/s':>9}{'vs file':>9}{'GPU GB':>8}")
    for row in bench.rows:
        row["gb_per_second"] = bench.num_bytes / 1e9 / row["seconds"]
        row["speedup_over_save_file"] = by_file / row["seconds"]
        print(
            f"{row['variant']:26}{row['seconds']:9.4f}{row['median_seconds']:9.4f}{row['gb_per_second']:9.2f}"
            f"{row['speedup_over_save_file']:9.2f}{row['extra_gpu_gb']:8.2f}"
        )
    write_result("refit_cuda", machine, bench.rows, options, bytes=bench.num_bytes)


if __name__ == "__main__":
    main()
