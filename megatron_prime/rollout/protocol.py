"""What the trainer knows of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.weights.shards import ShardSlice

OnAnswer = Callable[[int, int, Response], None]
"""Takes the number of the prompt, the number of the answer, and the answer."""


class ExportedWeights(Protocol):
    """Weights that an engine can take as a stream or slice by slice (`weights.stream.WeightExport`)."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def tensors(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]: ...

    def slices(self) -> Iterator[ShardSlice]: ...

    def gather(self, value: Any) -> list[Any]: ...


class Engine(Protocol):
    """Samples answers with weights that the trainer streams into it.

    `generate` and `load_weights` are collective: every rank calls them with equal arguments.
    """

    weight_version: int
    """Version of the loaded weights, -1 while there are none."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, on_answer: OnAnswer | None = None
    ) -> list[list[Response]]:
        """Samples ``sampling.num_responses`` answers for each prompt.

        Args:
            prompts: the same ones, in the same order, on every rank.
            sampling: how to sample.
            on_answer: called on one rank for an answer as soon as it has ended, where the engine knows that before
                all have; must return quickly.

        Returns:
            On every rank, for each prompt in order, its answers in order.

        Raises:
            RolloutError: there are no usable weights, or a prompt does not fit the model.
        """
        ...

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """Replaces all weights.

        Args:
            weights: (Hugging Face parameter name, whole tensor) pairs, always read to their end; an engine in another
                process may take a `weights.stream.WeightExport` apart instead.
            version: reported by every response sampled with these weights.

        Returns:
            Checksum of what the engine holds after loading, which is that of what was sent.

        Raises:
            RolloutError: the weights are not exactly the model's parameters, are not finite, or did not arrive
                unchanged; lists all problems. The engine then refuses to generate until a load succeeds.
        """
        ...

    def sleep(self) -> None:
        """Gives accelerator memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Undoes `sleep`."""
        ...

    def close(self) -> None:
        """Frees everything; the engine cannot be used afterwards."""
        ...
