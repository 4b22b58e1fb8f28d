"""What benches and tests build an engine from, without a configuration file or a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_prime.config.schema import RolloutSection, VllmSection
from megatron_prime.interfaces import EngineSetup, RankPlace
from megatron_prime.weights.architecture import read_architecture

ALONE = RankPlace(device=torch.device("cpu"))


def engine_setup(
    folder: Path,
    section: VllmSection,
    *,
    dtype: str = "float32",
    place: RankPlace = ALONE,
    end_token_ids: tuple[int, ...] = (),
    decode: Callable[[Sequence[int]], str] = str,
) -> EngineSetup:
    """The set-up of a vLLM engine with one thread per rank.

    Args:
        folder: Hugging Face folder of the model.
        section: of the engine.
        dtype: of its parameters.
        place: of the rank.
        end_token_ids: end an answer.
        decode: stands in for a tokenizer.
    """
    return EngineSetup(
        folder=str(folder),
        dtype=dtype,
        section=RolloutSection(engine="vllm", num_prompts=1, vllm=section),
        architecture=read_architecture(folder),
        place=place,
        num_threads=1,
        end_token_ids=end_token_ids,
        decode=decode,
    )
