"""Data sources by configuration."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from megatron_prime.config.schema import ArithmeticData, FileData
from megatron_prime.data.arithmetic import ArithmeticPrompts, ArithmeticSft
from megatron_prime.data.files import FilePrompts, FileSft
from megatron_prime.interfaces import DropCounts, PromptSource, SftSource

__all__ = ["DropCounts", "PromptSource", "SftSource", "build_prompt_source", "build_sft_source"]


def build_prompt_source(
    config: ArithmeticData | FileData, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PromptSource:
    """The prompts of a PRIME run.

    Args:
        config: section `data` of the configuration.
        tokenizer: the policy's.
        seed: seed of the order (and of the arithmetic problems).

    Returns:
        A source; two with equal arguments give equal prompts.

    Raises:
        DataError: files that cannot be read, rows of an unknown layout, a tokenizer that does not fit.
    """
    if isinstance(config, ArithmeticData):
        return ArithmeticPrompts(config, tokenizer, seed=seed)
    return FilePrompts(config, tokenizer, seed=seed)


def build_sft_source(config: ArithmeticData | FileData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> SftSource:
    """The examples of a supervised run; arguments and errors as in `build_prompt_source`."""
    if isinstance(config, ArithmeticData):
        return ArithmeticSft(config, tokenizer, seed=seed)
    return FileSft(config, tokenizer, seed=seed)
