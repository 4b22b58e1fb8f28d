"""vLLM engines inside the trainer's ranks: no process more, and on GPUs one memory that both take turns in."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prime import collectives
from megatron_prime.interfaces import EngineSetup, ExportedWeights
from megatron_prime.rollout.vllm.trainer.answers import not_finite, raise_for
from megatron_prime.rollout.vllm.trainer.base import Take, VllmEngine, Waiting
from megatron_prime.rollout.vllm.trainer.process import engine_environment
from megatron_prime.rollout.vllm.trainer.weight_writer import WeightWriter
from megatron_prime.rollout.vllm.wire.messages import Generate, LoadWeights
from megatron_prime.rollout.vllm.worker import engine_loop

_engines: list[Any] = []
"""Kept until the process ends: vLLM takes the default process group, which is the trainer's, with it."""


class VllmInRanks(VllmEngine):
    """vLLM's external launcher: consecutive ranks are the workers of one engine.

    Every rank of an engine asks it for the same answers in the same order, and gets them all. A failure here is one of
    the trainer: there is no other process to replace.

    Args:
        setup: see `VllmEngine`.
    """

    _all_ranks_ask = True

    def __init__(self, setup: EngineSetup) -> None:
        rank, size = collectives.rank(), setup.section.vllm.tensor_parallel_size
        num_engines = collectives.world_size() // size
        super().__init__(setup, engine_index=rank // size, num_engines=num_engines, is_leader=rank % size == 0)
        self._writer: WeightWriter | None = None
        self._is_asleep = False
        os.environ.update(engine_environment(on_gpu=torch.cuda.is_available()))
        with _undisturbed(), _own_shared_memory():
            self._llm: Any = engine_loop.build(self._options, in_ranks=True)
        _engines.append(self._llm)

    def _sample(self, waiting: Waiting, take: Take) -> str | None:
        self.wake()
        if waiting:
            with _undisturbed():
                engine_loop.generate(self._llm, Generate(requests=tuple(waiting.values())), take)
        return None

    def _prepare(self, weights: ExportedWeights) -> list[str]:
        self.wake()
        if self._writer is None:
            leads = weights.gather(collectives.rank())[0] == collectives.rank()
            self._writer = WeightWriter(weights, self._section, is_leader=leads)
        problems = not_finite(self._writer.begin(weights))
        if self._writer.gathers:
            problems.append("rollout.vllm.in_ranks: the ranks of a model copy are on several hosts; use false")
        return problems

    def _load(self, weights: ExportedWeights, version: int) -> str:
        assert self._writer is not None
        self._writer.write(weights)
        problem = None
        try:
            with _undisturbed():
                engine_loop.load(self._llm, LoadWeights(update=self._writer.update, version=version))
        except (ValueError, RuntimeError) as error:
            problem = f"weights of version {version}: {error}"
        raise_for(collectives.all_gather(problem))
        return self._writer.checksum()

    def sleep(self) -> None:
        """Moves the weights to host memory and forgets keys and values, on a GPU; the next use undoes it."""
        if torch.cuda.is_available() and not self._is_asleep:
            self._llm.sleep(level=1)
            self._is_asleep = True

    def wake(self) -> None:
        """Undoes `sleep`."""
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def close(self) -> None:
        """Frees the shared memory; the engine goes with the process."""
        super().close()
        if self._writer is not None:
            self._writer.close()
        self._writer = None


@contextlib.contextmanager
def _own_shared_memory() -> Iterator[None]:
    """Memory that the workers of a CPU engine share gets a name of this run's, and loses it once all have opened it.

    vLLM names it after the rendezvous, which is the same for every external launcher: another run on this host would
    find it, and so would the next one after a run that was killed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    run = collectives.all_gather(uuid.uuid4().hex)[0]
    name_of = _CPUSHMDistributed.make_group_name
    names = []

    def own_name(communicator: Any) -> str:
        names.append(f"{run}{name_of(communicator).lstrip('/')}")
        return names[-1]

    _CPUSHMDistributed.make_group_name = staticmethod(own_name)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(name_of)
        for path in (path for name in names for path in Path("/dev/shm").glob(f"{glob.escape(name)}_*")):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the trainer's random numbers and CUDA stream from vLLM, which uses the process's and sets its own."""
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    streams = [torch.cuda.current_stream() for _ in devices]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(stream)
