"""What the trainer knows of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from megatron_prime.batch import Prompt, Response, SamplingParams


class Engine(Protocol):
    """Samples answers with weights that the trainer streams into it.

    `generate` and `load_weights` are collective: every rank calls them with equal arguments.
    """

    weight_version: int
    """Version of the loaded weights, -1 while there are none."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Response]]:
        """Samples ``sampling.num_responses`` answers for each prompt.

        Args:
            prompts: the same ones, in the same order, on every rank.
            sampling: how to sample.

        Returns:
            On every rank, for each prompt in order, its answers in order.

        Raises:
            RolloutError: there are no usable weights, or a prompt does not fit the model.
        """
        ...

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Replaces all weights.

        Args:
            stream: (Hugging Face parameter name, whole tensor) pairs; always read to its end.
            version: reported by every response sampled with these weights.

        Returns:
            Checksum of the engine's own weights after loading.

        Raises:
            RolloutError: the stream is not exactly the model's parameters, or they are not finite; lists all problems.
                The engine then refuses to generate until a load succeeds.
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
