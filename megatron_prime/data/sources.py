"""Data sources by configuration."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from megatron_prime.batch import Prompt
from megatron_prime.config.schema import ArithmeticData, FileData, OwnData
from megatron_prime.data.arithmetic import ArithmeticPrompts, ArithmeticSft
from megatron_prime.data.files import FilePrompts, FileSft, first_prompts
from megatron_prime.data.own import make_own_prompts
from megatron_prime.interfaces import DropCounts, PromptSource, SftSource

__all__ = ["DropCounts", "PromptSource", "SftSource", "build_prompt_source", "build_sft_source", "example_prompts"]


def build_prompt_source(
    config: ArithmeticData | FileData | OwnData, tokenizer: PreTrainedTokenizerBase, *, seed: int
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
        ConfigError: a source of the user's own that cannot be imported.
    """
    if isinstance(config, ArithmeticData):
        return ArithmeticPrompts(config, tokenizer, seed=seed)
    if isinstance(config, OwnData):
        return make_own_prompts(config, tokenizer, seed=seed)
    return FilePrompts(config, tokenizer, seed=seed)


def example_prompts(
    config: ArithmeticData | FileData | OwnData, tokenizer: PreTrainedTokenizerBase, *, count: int
) -> list[Prompt]:
    """Some training prompts, at most `count`, without reading all rows of files; errors as in `build_prompt_source`."""
    if isinstance(config, FileData):
        return first_prompts(config, tokenizer, count)
    return build_prompt_source(config, tokenizer, seed=0).take(0, count)


def build_sft_source(config: ArithmeticData | FileData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> SftSource:
    """The examples of a supervised run; arguments and errors as in `build_prompt_source`."""
    if isinstance(config, ArithmeticData):
        return ArithmeticSft(config, tokenizer, seed=seed)
    return FileSft(config, tokenizer, seed=seed)
