"""The vLLM engine as the trainer sees it: one process beside each data-parallel group of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_prime import collectives
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import ExportedWeights, OnAnswer
from megatron_prime.rollout.prompts import check_prompts
from megatron_prime.rollout.vllm.trainer.answers import make_request, not_finite, raise_for, raise_together, to_response
from megatron_prime.rollout.vllm.trainer.process import EngineLost, EngineParent, EngineProcess
from megatron_prime.rollout.vllm.trainer.weight_writer import WeightWriter
from megatron_prime.rollout.vllm.wire.messages import EngineOptions, EngineRequest

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
    bucket_bytes: int
    """Size of each of the two buckets that weights come in, where they come in such."""


@dataclass(frozen=True, slots=True)
class Share:
    """The answers that one engine samples, by request."""

    waiting: dict[str, EngineRequest]
    done: dict[str, Response]


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
        self._version = -1
        """Of the weights that the engine has, or shall have."""
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
        mine = prompts[setup.engine_index :: setup.num_engines] if setup.is_leader else []
        keys = [(index, answer) for index in range(len(mine)) for answer in range(sampling.num_responses)]
        requests = [
            make_request(f"{index}/{answer}", mine[index], answer, sampling, setup.end_token_ids)
            for index, answer in keys
        ]
        share = Share({request.request_id: request for request in requests}, {})
        problem = self._sample(share, on_answer)
        groups = []
        if problem is None:
            groups = [[share.done[f"{i}/{a}"] for a in range(sampling.num_responses)] for i in range(len(mine))]
        answers = collectives.all_gather((setup.engine_index, groups, problem) if setup.is_leader else None)
        shares = sorted((answer for answer in answers if answer is not None), key=lambda answer: answer[0])
        raise_for(problem for _, _, problem in shares)
        return collectives.interleave([groups for _, groups, _ in shares])

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """See `protocol.Engine.load_weights`; a failed load leaves no engine that could generate."""
        self.weight_version = -1
        if torch.cuda.is_available():
            # What torch keeps for later is lost to an engine on the same GPUs, above all to one that has to start.
            torch.cuda.empty_cache()
        self.prepare(weights)
        # Also says that every rank is prepared.
        raise_together(not_finite(self._begin(weights)), f"weights of version {version}: ")
        self._version = version
        raise_for(collectives.all_gather(self._load(weights)))
        self.weight_version = version
        return self._checksum()

    def prepare(self, weights: ExportedWeights) -> None:
        """Makes ready for a set of weights; the first time plans for all; a collective of the copy's ranks."""
        setup = self._setup
        if self._writer is None:
            self._writer = WeightWriter(
                weights,
                is_leader=setup.is_leader,
                num_workers=setup.options.tensor_parallel_size,
                with_digests=setup.verify_refit,
                timeout_seconds=setup.timeout_seconds,
            )

    def _begin(self, weights: ExportedWeights) -> list[str]:
        """Looks at what will be loaded; names of this rank's tensors that hold NaN or an infinity."""
        assert self._writer is not None
        return self._writer.begin(weights)

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

    def _checksum(self) -> str:
        assert self._writer is not None
        return self._writer.checksum()

    def _load(self, weights: ExportedWeights) -> str | None:
        """Has the engine load weights that are prepared for; what went wrong. A collective of the copy's ranks."""
        assert self._writer is not None
        if not self._setup.is_leader:
            self._writer.write(weights)
            return None
        try:
            if self._process is not None:
                # It follows this rank's writing.
                try:
                    self._process.begin_load(self._writer.update, self._version)
                except EngineLost as error:
                    self._lose(error)
            self._writer.write(weights)
            self._with_restarts(self._finish_load)
        except RolloutError as error:
            return str(error)
        return None

    def _finish_load(self) -> None:
        """Returns when the engine holds the current weights."""
        assert self._process is not None
        if self._process.loading == self._version:
            self._process.finish_load()

    def _sample(self, share: Share, on_answer: OnAnswer | None) -> str | None:
        """Has the engine sample what is waiting; what went wrong."""
        if not share.waiting:
            return None
        try:
            self._with_restarts(lambda: self._sample_the_rest(share, on_answer))
        except RolloutError as error:
            return str(error)
        return None

    def _sample_the_rest(self, share: Share, on_answer: OnAnswer | None) -> None:
        assert self._process is not None
        setup = self._setup
        for finished in self._process.generate(list(share.waiting.values()), setup.abort_after_seconds):
            del share.waiting[finished.request_id]
            response = share.done[finished.request_id] = to_response(finished, setup.decode)
            if on_answer is not None:
                index, answer = map(int, finished.request_id.split("/"))
                on_answer(setup.engine_index + index * setup.num_engines, answer, response)

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

    def _lose(self, error: Exception) -> None:
        logger.warning("vLLM engine %d was lost: %s", self._setup.engine_index, error)
        if self._process is not None:
            self._process.close()
        self._process = None

    def _start(self) -> None:
        """A new engine process with the current weights."""
        assert self._writer is not None
        self._process = self._new_process()
        self._process.begin_load(self._writer.update, self._version)
        self._process.finish_load()

    def _new_process(self) -> EngineProcess:
        """An engine process without weights."""
        if self._parent is None or not self._parent.is_alive:
            self._parent, self._owns_parent = self._new_parent(), True
        return EngineProcess(self._parent, self._setup.options, self._setup.timeout_seconds)

    def _new_parent(self) -> EngineParent:
        setup = self._setup
        return EngineParent(setup.num_threads, setup.device_ids, setup.timeout_seconds)
