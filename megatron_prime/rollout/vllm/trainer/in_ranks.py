"""vLLM engines inside the trainer's ranks: no process more, and on GPUs one memory that both take turns in."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prime import collectives
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import ExportedWeights, OnAnswer
from megatron_prime.rollout.prompts import check_prompts
from megatron_prime.rollout.vllm.trainer.answers import make_request, not_finite, raise_for, raise_together, to_response
from megatron_prime.rollout.vllm.trainer.beside import VllmSetup
from megatron_prime.rollout.vllm.trainer.process import engine_environment
from megatron_prime.rollout.vllm.trainer.weight_writer import WeightWriter
from megatron_prime.rollout.vllm.wire.messages import Finished, Generate, LoadWeights

_engines: list[Any] = []
"""Kept until the process ends: vLLM takes the default process group, which is the trainer's, with it."""


class VllmInRanks:
    """Engine (`protocol.Engine`) of vLLM's external launcher: consecutive ranks are the workers of one engine.

    Every rank of an engine asks it for the same answers in the same order, and gets them all. A failure here is one of
    the trainer: there is no other process to replace.

    Args:
        setup: `engine_index` counts engines, not model copies.
    """

    def __init__(self, setup: VllmSetup) -> None:
        from megatron_prime.rollout.vllm.worker import engine_loop as server

        self.weight_version = -1
        self._setup = setup
        self._server = server
        self._writer: WeightWriter | None = None
        self._is_asleep = False
        os.environ.update(engine_environment(on_gpu=bool(setup.device_ids)))
        with _undisturbed(), _own_shared_memory():
            self._llm: Any = server.build(setup.options, in_ranks=True)
        _engines.append(self._llm)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """See `protocol.Engine.generate`; a prompt's answers are all sampled by the same engine."""
        setup = self._setup
        if self.weight_version < 0:
            raise RolloutError("the rollout engine cannot generate: it has no weights; call load_weights first")
        longest, vocab_size = setup.options.max_model_len, setup.vocab_size
        check_prompts(prompts, sampling.max_response_tokens, max_length=longest, vocab_size=vocab_size)
        self.wake()
        mine = range(len(prompts))[setup.engine_index :: setup.num_engines]
        requests = {
            f"{index}/{answer}": make_request(
                f"{index}/{answer}", prompts[index], answer, sampling, setup.end_token_ids
            )
            for index in mine
            for answer in range(sampling.num_responses)
        }
        done: dict[str, Response] = {}

        def take(finished: Finished) -> None:
            response = done[finished.request_id] = to_response(finished, setup.decode)
            if on_answer is not None and setup.is_leader:
                index, answer = map(int, finished.request_id.split("/"))
                on_answer(index, answer, response)

        if requests:
            with _undisturbed():
                self._server.generate(self._llm, Generate(requests=tuple(requests.values())), take)
        groups = [[done[f"{index}/{answer}"] for answer in range(sampling.num_responses)] for index in mine]
        shares = collectives.all_gather((setup.engine_index, groups) if setup.is_leader else None)
        ordered = sorted((share for share in shares if share is not None), key=lambda share: share[0])
        return collectives.interleave([groups for _, groups in ordered])

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """See `protocol.Engine.load_weights`."""
        self.weight_version = -1
        self.wake()
        writer = self._writer
        if writer is None:
            leads = weights.gather(collectives.rank())[0] == collectives.rank()
            writer = self._writer = WeightWriter(
                weights,
                is_leader=leads,
                num_workers=self._setup.options.tensor_parallel_size,
                with_digests=self._setup.verify_refit,
                timeout_seconds=self._setup.timeout_seconds,
            )
        problems = not_finite(writer.begin(weights))
        if writer.gathers:
            problems.append("rollout.vllm.in_ranks: the ranks of a model copy are on several hosts; use false")
        # Also says that every rank has begun.
        raise_together(problems)
        writer.write(weights)
        problem = None
        try:
            with _undisturbed():
                self._server.load(self._llm, LoadWeights(update=writer.update, version=version))
        except (ValueError, RuntimeError) as error:
            problem = f"weights of version {version}: {error}"
        raise_for(collectives.all_gather(problem))
        self.weight_version = version
        return writer.checksum()

    def sleep(self) -> None:
        """Moves the weights to host memory and forgets keys and values, on a GPU; the next use undoes it."""
        if self._setup.device_ids and not self._is_asleep:
            self._llm.sleep(level=1)
            self._is_asleep = True

    def wake(self) -> None:
        """Undoes `sleep`."""
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def close(self) -> None:
        """Frees the shared memory; the engine goes with the process."""
        self.weight_version = -1
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
