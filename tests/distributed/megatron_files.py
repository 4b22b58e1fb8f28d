"""Megatron's own writer and reader of distributed checkpoints, to hold ours against."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """Lets Megatron's writer work in this process instead of in forked ones.

    A forked writer that dies leaves the save waiting for ever, and a fork copies whatever locks other
    threads (gloo's, OpenMP's) hold; the spawned queue beside it costs seconds per run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync

    def write(
        transforms: list[Any], use_msc: bool, rank: int, buckets: Sequence[Any], results: queue.Queue[Any]
    ) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            finished: queue.Queue[Any] = queue.Queue()
            open_tasks: queue.Queue[int] = queue.Queue()
            open_tasks.put(index)
            writer.write_preloaded_data(transforms, index, bucket, finished, open_tasks, use_fsync=True)  # pyright: ignore[reportArgumentType]
            _, outcome = finished.get_nowait()
            if isinstance(outcome, Exception):
                results.put(outcome)
                return
            written[index] = outcome
        results.put(written)

    with (
        mock.patch.object(writer, "write_preloaded_data_multiproc", staticmethod(write)),
        mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue),
    ):
        yield


def megatron_saves(gpt: Any, path: Path) -> None:
    """Writes a model; collective, inside `megatron_platform`."""
    from megatron.core import dist_checkpointing

    with _in_this_process():
        dist_checkpointing.save({"model": gpt.sharded_state_dict()}, str(path))


def megatron_loads(gpt: Any, path: Path) -> None:
    """Reads a model; collective, inside `megatron_platform`."""
    from megatron.core import dist_checkpointing

    state: Any = {"model": gpt.sharded_state_dict()}
    # Layers without Transformer Engine ask for an empty `_extra_state`.
    loaded: Any = dist_checkpointing.load(state, str(path), strict="ignore_all")
    gpt.load_state_dict(loaded["model"])
