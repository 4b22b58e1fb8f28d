"""The vLLM engine as the trainer sees it: one process beside each data-parallel group of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_prime import world
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.rollout.prompts import check_prompts
from megatron_prime.rollout.protocol import ExportedWeights, OnAnswer
from megatron_prime.rollout.vllm.answers import make_request, raise_for, to_response
from megatron_prime.rollout.vllm.messages import EngineOptions, SharedUpdate
from megatron_prime.rollout.vllm.process import EngineLost, EngineParent, EngineProcess
from megatron_prime.rollout.vllm.writer import WeightWriter
from megatron_prime.weights.shards import find_non_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSetup:
    """How engines are started and where this rank stands among them."""

    options: EngineOptions
    vocab_size: int
    end_token_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    """Tokens of an answer (without the token that ended it) to text."""
    engine_index: int
    """Which engine this rank's weights go to: its data-parallel rank."""
    num_engines: int
    is_leader: bool
    """Whether this rank talks to the engine; one per engine."""
    num_threads: int
    device_ids: tuple[int, ...]
    """GPUs of the engine on this host; empty on a CPU."""
    timeout_seconds: float
    max_restarts: int
    verify_refit: bool
    abort_after_seconds: float | None = None
    """When to cut off answers that are not finished; None: never."""


class VllmEngine:
    """Engine (`protocol.Engine`) whose vLLM runs in other processes, so that a crash there is no crash here.

    The ranks of a model copy write their shards straight into memory that their engine reads: nothing is gathered.
    A lost engine is replaced by a new one that loads the current weights from that memory and samples the answers
    that were still missing; seeds belong to answers, so none is lost, doubled or drawn from other weights.

    Args:
        setup: see there.
        parent: forks the engines, in place of one of its own; stays open at `close`.
    """

    def __init__(self, setup: VllmSetup, parent: EngineParent | None = None) -> None:
        self.weight_version = -1
        self._setup = setup
        self._parent = parent
        self._owns_parent = parent is None
        self._process: EngineProcess | None = None
        self._writer: WeightWriter | None = None
        self._update: SharedUpdate | None = None
        self._version = -1
        """Of the weights in the memory."""
        if setup.is_leader and parent is None:
            self._parent = self._new_parent()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """See `protocol.Engine.generate`; a prompt's answers are all sampled by the same engine."""
        setup = self._setup
        if self.weight_version < 0:
            raise RolloutError("the rollout engine cannot generate: it has no weights; call load_weights first")
        check_prompts(
            prompts,
            sampling.max_response_tokens,
            max_length=setup.options.max_model_len,
            vocab_size=setup.vocab_size,
        )
        groups: list[list[Response]] = []
        problem = None
        if setup.is_leader:
            try:
                groups = self._sample(prompts[setup.engine_index :: setup.num_engines], sampling, on_answer)
            except RolloutError as error:
                problem = str(error)
        answers = world.all_gather((setup.engine_index, groups, problem) if setup.is_leader else None)
        shares = sorted((answer for answer in answers if answer is not None), key=lambda answer: answer[0])
        raise_for(problem for _, _, problem in shares)
        return world.interleave([groups for _, groups, _ in shares])

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """See `protocol.Engine.load_weights`; a failed load leaves no engine that could generate."""
        self.weight_version = -1
        writer = self.writer(weights)
        writer.begin()
        problems = [f"{name}: holds values that are not finite" for name in find_non_finite(weights.slices())]
        # Also says that every rank has begun.
        problems = sorted({problem for found in world.all_gather(problems) for problem in found})
        if problems:
            raise RolloutError("\n".join(f"weights of version {version}: {problem}" for problem in problems))
        problem = None
        if self._setup.is_leader:
            self._version = version
            try:
                self._begin_load()
                writer.write(weights)
                self._with_restarts(self._finish_load)
            except RolloutError as error:
                problem = str(error)
        else:
            writer.write(weights)
        raise_for(world.all_gather(problem))
        self.weight_version = version
        return writer.checksum()

    def writer(self, weights: ExportedWeights) -> WeightWriter:
        """The way into the memory that this rank's engine reads, planned at the first refit."""
        setup = self._setup
        if self._writer is None:
            self._writer = WeightWriter(weights, is_leader=setup.is_leader, with_digests=setup.verify_refit)
            self._update = SharedUpdate(
                path=self._writer.path,
                plan=self._writer.plan,
                compare_digests=setup.verify_refit,
                timeout_seconds=setup.timeout_seconds,
            )
        return self._writer

    def sleep(self) -> None:
        """An engine process keeps its memory; nothing to do."""

    def wake(self) -> None:
        """Undoes `sleep`."""

    def close(self) -> None:
        """Ends the engine process and frees the shared memory."""
        self.weight_version = -1
        if self._process is not None:
            self._process.close()
        if self._parent is not None and self._owns_parent:
            self._parent.close()
        if self._writer is not None:
            self._writer.close()
        self._process = self._parent = self._writer = None

    def process_id(self) -> int | None:
        """Of this rank's engine process, where there is one."""
        return self._process.process_id if self._process is not None else None

    def _begin_load(self) -> None:
        """Has the engine follow this rank's writing, if there is an engine; otherwise `_finish_load` starts one."""
        if self._process is not None:
            assert self._update is not None
            try:
                self._process.begin_load(self._update, self._version)
            except EngineLost as error:
                self._lose(error)

    def _finish_load(self) -> None:
        """Returns when the engine holds the current weights."""
        assert self._process is not None
        if self._process.loading == self._version:
            self._process.finish_load()

    def _sample(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None
    ) -> list[list[Response]]:
        waiting = {
            f"{index}/{answer}": make_request(f"{index}/{answer}", prompt, answer, sampling, self._setup.end_token_ids)
            for index, prompt in enumerate(prompts)
            for answer in range(sampling.num_responses)
        }
        done: dict[str, Response] = {}

        def sample_the_rest() -> None:
            assert self._process is not None
            for finished in self._process.generate(list(waiting.values()), self._setup.abort_after_seconds):
                del waiting[finished.request_id]
                response = done[finished.request_id] = to_response(finished, self._setup.decode)
                if on_answer is not None:
                    index, answer = map(int, finished.request_id.split("/"))
                    on_answer(self._setup.engine_index + index * self._setup.num_engines, answer, response)

        if waiting:
            self._with_restarts(sample_the_rest)
        return [
            [done[f"{index}/{answer}"] for answer in range(sampling.num_responses)] for index in range(len(prompts))
        ]

    def _with_restarts(self, action: Callable[[], None]) -> None:
        """Does something with the engine, on a new one with the current weights whenever one is lost."""
        attempts = self._setup.max_restarts + 1
        for attempt in range(attempts):
            try:
                if self._process is None:
                    self._start()
                action()
                return
            except EngineLost as error:
                self._lose(error)
                if attempt == attempts - 1:
                    raise RolloutError(
                        f"vLLM engine {self._setup.engine_index} was lost {attempts} times in a row; "
                        f"the last time: {error}"
                    ) from error

    def _lose(self, error: EngineLost) -> None:
        logger.warning("vLLM engine %d was lost: %s", self._setup.engine_index, error)
        if self._process is not None:
            self._process.close()
        self._process = None

    def _start(self) -> None:
        """A new engine process with the current weights."""
        setup = self._setup
        assert self._update is not None
        if self._parent is None or not self._parent.is_alive:
            self._parent, self._owns_parent = self._new_parent(), True
        self._process = EngineProcess(self._parent, setup.options, setup.timeout_seconds)
        self._process.begin_load(self._update, self._version)
        self._process.finish_load()

    def _new_parent(self) -> EngineParent:
        setup = self._setup
        return EngineParent(setup.num_threads, setup.device_ids, setup.timeout_seconds)
