"""What every arrangement of vLLM does alike: it refuses, shares out prompts, counts versions and gathers answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch

from megatron_prime import collectives
from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.config.schema import VllmSection
from megatron_prime.errors import RolloutError
from megatron_prime.interfaces import EngineSetup, ExportedWeights, OnAnswer
from megatron_prime.rollout.prompts import check_prompts
from megatron_prime.rollout.vllm.trainer.answers import (
    make_request,
    raise_for,
    raise_together,
    request_key,
    to_response,
)
from megatron_prime.rollout.vllm.wire.messages import EngineOptions, EngineRequest, Finished
from megatron_prime.weights.architecture import ModelArchitecture

Waiting = dict[str, EngineRequest]
"""Answers that are still to be sampled, by `EngineRequest.request_id`."""
Take = Callable[[Finished], None]
"""Takes an answer, which then no longer waits."""


class VllmEngine:
    """Engine (`interfaces.Engine`) of vLLM, wherever its workers run.

    Args:
        setup: what engines are built from.
        engine_index: the engine that this rank belongs to.
        num_engines: that share out the prompts; a prompt's answers are all sampled by the same one.
        is_leader: whether this rank speaks for its engine; one per engine.
    """

    weight_version: int
    _all_ranks_ask = False
    """Whether an engine is asked by all of its ranks, not only by the leader."""

    def __init__(self, setup: EngineSetup, *, engine_index: int, num_engines: int, is_leader: bool) -> None:
        self.weight_version = -1
        self._setup, self._section = setup, setup.section.vllm
        self._options = engine_options(setup.folder, setup.dtype, self._section, setup.architecture)
        self._engine_index, self._num_engines, self._is_leader = engine_index, num_engines, is_leader
        self._bucket_bytes = self._section.bucket_mib * 2**20
        """Size of each of the two buckets, where weights come in such."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """See `interfaces.Engine.generate`."""
        if self.weight_version < 0:
            raise RolloutError("the rollout engine cannot generate: it has no weights; call load_weights first")
        setup = self._setup
        check_prompts(
            prompts,
            sampling.max_response_tokens,
            max_length=self._options.max_model_len,
            vocab_size=setup.architecture.vocab_size,
        )
        mine = range(self._engine_index, len(prompts), self._num_engines)
        waiting: Waiting = {}
        if self._is_leader or self._all_ranks_ask:
            for index, answer in product(mine, range(sampling.num_responses)):
                request = make_request(index, answer, prompts[index], sampling, setup.end_token_ids)
                waiting[request.request_id] = request
        done: dict[tuple[int, int], Response] = {}

        def take(finished: Finished) -> None:
            del waiting[finished.request_id]
            key = request_key(finished.request_id)
            done[key] = to_response(finished, setup.decode)
            if on_answer is not None and self._is_leader:
                on_answer(*key, done[key])

        problem = self._sample(waiting, take)
        groups: list[list[Response]] = []
        if problem is None and self._is_leader:
            groups = [[done[index, answer] for answer in range(sampling.num_responses)] for index in mine]
        found = collectives.all_gather((self._engine_index, groups, problem) if self._is_leader else None)
        shares = sorted((share for share in found if share is not None), key=lambda share: share[0])
        raise_for(problem for _, _, problem in shares)
        return collectives.interleave([groups for _, groups, _ in shares])

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """See `interfaces.Engine.load_weights`; until a load succeeds nothing is sampled."""
        self.weight_version = -1
        # Also says that every rank is prepared.
        raise_together(self._prepare(weights), f"weights of version {version}: ")
        checksum = self._load(weights, version)
        self.weight_version = version
        return checksum

    def sleep(self) -> None:
        """Does nothing: the memory is another process's."""

    def wake(self) -> None:
        """Undoes `sleep`."""

    def close(self) -> None:
        """See `interfaces.Engine.close`."""
        self.weight_version = -1

    def _sample(self, waiting: Waiting, take: Take) -> str | None:
        """Has the engine sample all that waits.

        Args:
            waiting: none on ranks that do not ask; an answer is no longer in it when it has been taken.
            take: is called with every answer.

        Returns:
            What went wrong; None: nothing waits any more.
        """
        raise NotImplementedError

    def _prepare(self, weights: ExportedWeights) -> list[str]:
        """Makes ready for weights before any engine is touched; what is wrong with this rank's."""
        raise NotImplementedError

    def _load(self, weights: ExportedWeights, version: int) -> str:
        """Loads weights that are prepared for, on all ranks together, and returns their checksum.

        Raises:
            RolloutError: on every rank alike.
        """
        raise NotImplementedError


def engine_options(folder: str, dtype: str, section: VllmSection, architecture: ModelArchitecture) -> EngineOptions:
    """What one engine is built from, wherever it runs."""
    by_ipc = section.transfer == "ipc"
    if section.transfer == "auto":
        by_ipc = torch.cuda.is_available() and not section.in_ranks
    return EngineOptions(
        folder=folder,
        dtype=dtype,
        section=section,
        max_model_len=section.max_model_len or architecture.max_position_embeddings,
        transfer="ipc" if by_ipc else "shared_memory",
    )
