"""A rollout engine of your own: the built-in one of `transformers`, and every answer written down.

    PYTHONPATH=examples megatron-prime train my.yaml rollout.engine=own_engine:recording_engine

appends one JSON row per answer to `answers.jsonl` in the current folder. `megatron-prime check` looks at the signature
of the factory and at the methods of the class that it says it makes, before anything starts. The protocol is
`megatron_prime.interfaces.Engine`: `generate` and `load_weights` are called on every rank with equal arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_prime import (
    Engine,
    EngineSetup,
    ExportedWeights,
    Prompt,
    Response,
    SamplingParams,
    is_main,
    resolve,
)


class RecordingEngine:
    """Samples with another engine and keeps a record."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path

    @property
    def weight_version(self) -> int:
        """Of the weights that answers are sampled with; -1: there are none yet."""
        return self._engine.weight_version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_answer: Callable[[int, int, Response], None] | None = None,
    ) -> list[list[Response]]:
        """Answers every prompt `sampling.num_responses` times; every rank returns all answers."""
        groups = self._engine.generate(prompts, sampling, on_answer)
        if is_main():
            with self._path.open("a", encoding="utf-8") as file:
                for prompt, group in zip(prompts, groups, strict=True):
                    for response in group:
                        row = {
                            "prompt": prompt.text,
                            "answer": response.text,
                            "tokens": len(response.token_ids),
                            "mean_logprob": sum(response.logprobs) / len(response.logprobs),
                            "weight_version": response.weight_version,
                        }
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return groups

    def load_weights(self, weights: ExportedWeights, version: int) -> str:
        """Takes the trainer's weights and returns a checksum of what it holds."""
        return self._engine.load_weights(weights, version)

    def sleep(self) -> None:
        """Gives accelerator memory back while the models train."""
        self._engine.sleep()

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._engine.wake()

    def close(self) -> None:
        """Frees everything."""
        self._engine.close()


def recording_engine(setup: EngineSetup) -> RecordingEngine:
    """What `rollout.engine` names: takes the one argument that all factories take."""
    return RecordingEngine(resolve("rollout.engine", "transformers")(setup), Path("answers.jsonl"))
