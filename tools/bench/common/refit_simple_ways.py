"""The simple ways of putting weights into a vLLM engine, beside which `refit.py` measures ours."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from common.measuring import Row, reset_peak
from common.refit_setup import peak_gb, section, timings, trainer_place
from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.trainer.base import engine_options
from megatron_prime.rollout.vllm.trainer.process import engine_environment
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder

FILE = "save_file + load"
BUCKET_BYTES = 64 << 20


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


def refit_by_file(weights: dict[str, torch.Tensor], engine: Connection) -> None:
    """The simplest way of all."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        save_file(weights, f"{scratch}/weights.safetensors")
        engine.send(("file", f"{scratch}/weights.safetensors"))
        engine.recv()


def file_rank(
    rank: int, sizes: tuple[int, int], folder: Path, port: int, settings: VllmSection, repeats: int, results: Any
) -> None:
    """One rank whose shards the first one gathers and writes for the engine."""
    _, weights = trainer_place(rank, sizes, folder, port)
    process, ours, engine_id = None, None, 0
    if rank == 0:
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, folder, settings.tensor_parallel_size, None)
        process = multiprocessing.get_context("spawn").Process(target=simple_engine, args=arguments)
        process.start()
        engine_id = ours.recv()
    try:
        seconds = []
        for _ in range(repeats + 1):
            dist.barrier()
            begun = time.perf_counter()
            if ours is None:
                deque(weights, maxlen=0)
            else:
                # A gathered tensor lies where the next one will.
                is_alone = sizes == (1, 1)
                refit_by_file({name: tensor if is_alone else tensor.clone() for name, tensor in weights}, ours)
            seconds.append(time.perf_counter() - begun)
            if ours is not None and len(seconds) == 1:
                reset_peak()
                reset_peak(engine_id)
        if ours is not None:
            peaks = {"trainer_peak_gb": peak_gb(), "engine_peak_gb": peak_gb(engine_id)}
            results.put(timings(seconds[1:]) | peaks)
            ours.send(("end", None))
    finally:
        # This process would wait for it at its end.
        if process is not None and sys.exc_info()[0] is not None:
            process.kill()
    dist.destroy_process_group()


def simple_engine(connection: Connection, folder: Path, num_workers: int, port: int | None) -> None:
    """A vLLM engine that is refitted in the simple ways, without any check; a port of a store means gloo, too."""
    os.environ |= engine_environment(on_gpu=False) | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    from megatron_prime.rollout.vllm.worker.engine_loop import build

    settings = section(num_workers, False, False)
    llm = build(engine_options(str(folder), "bfloat16", settings, read_architecture(folder)))
    group, meta = None, []
    if port is not None:
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
        group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=60))
        meta = list(FolderExport(HfFolder(folder), read_architecture(folder), torch.bfloat16))
    connection.send(os.getpid())
    while True:
        kind, payload = connection.recv()
        with torch.no_grad():
            if kind == "file":
                llm.collective_rpc(load_file, args=(payload,))
            elif kind == "pickled":
                llm.collective_rpc(lambda worker: worker.get_model())[0].load_weights(
                    iter(pickle.loads(payload).items())
                )
            elif kind == "gloo":
                llm.collective_rpc(lambda worker: worker.get_model())[0].load_weights(received(meta, group))
            else:
                return
        llm.reset_prefix_cache()
        connection.send("done")


def load_file(worker: Any, path: str) -> None:
    """What a vLLM worker does with a file."""
    with torch.no_grad(), safe_open(path, "pt") as opened:
        worker.get_model().load_weights((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118


def received(meta: list[tuple[str, torch.Tensor]], group: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as a gloo broadcast brings them."""
    for bucket in buckets(meta):
        flat = torch.empty(sum(t.numel() for _, t in bucket), dtype=torch.bfloat16)
        group.broadcast([flat], dist.BroadcastOptions()).wait()
        for (name, tensor), part in zip(bucket, flat.split([t.numel() for _, t in bucket]), strict=True):
            yield name, part.view(tensor.shape)


def bench_simple(folder: Path, repeats: int, port: int) -> list[Row]:
    """The simple ways from one process that has whole tensors to an engine of one worker."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    process = context.Process(target=simple_engine, args=(theirs, folder, 1, port))
    process.start()
    group = dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=60))
    engine_id = ours.recv()
    weights = {
        name: tensor.clone()
        for name, tensor in FolderExport(HfFolder(folder), read_architecture(folder), torch.bfloat16)
    }

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
    ways: dict[str, Callable[[], None]] = {
        "gloo broadcast": by_gloo,
        "pickled": pickled,
        FILE: lambda: refit_by_file(weights, ours),
    }
    for name, way in ways.items():
        way()
        reset_peak()
        reset_peak(engine_id)
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - begun)
        rows.append(
            {"variant": name}
            | timings(seconds)
            | {
                "trainer_peak_gb": peak_gb(),
                "engine_peak_gb": peak_gb(engine_id),
            }
        )
    ours.send(("end", None))
    process.join()
    return rows
