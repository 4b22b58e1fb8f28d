"""The data sections of a configuration; see `schema`."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from megatron_prime.config.section import (
    Count,
    Fraction,
    FractionBelowOne,
    Named,
    Section,
)


@dataclass(kw_only=True, slots=True)
class ArithmeticData(Section):
    """Chains of additions and subtractions, made by a generator that also knows which steps are right."""

    kind: Literal["arithmetic"] = "arithmetic"
    min_operations: Count = 2
    max_operations: Count = 4
    max_operand: Count = 9
    max_start: Count = 99
    """The chain starts with a number of 1 .. max_start."""
    step_error_rate: FractionBelowOne = 0.15
    """Share of wrong steps in the SFT answers; reinforcement has these to repair."""
    wrong_fact_share: Fraction = 0.0
    """Share of the facts (last digit of the left number, sign, operand) that the SFT answers get wrong, each always by
    the same amount."""
    wrong_fact_rate: Fraction = 0.75
    """How often they get such a fact wrong; above 0.5, greedy decoding of what was learned is wrong too."""
    num_problems: Count = 100_000
    """Problems of one epoch."""


@dataclass(kw_only=True, slots=True)
class FileData(Section):
    """Prompts from files or Hugging Face datasets (Eurus-2-RL-Data, GSM8K and MATH layouts)."""

    kind: Literal["files"] = "files"
    train: list[str]
    """Files `.jsonl`, `.jsonl.gz`, `.json` or `.parquet`, or `hf:NAME[:CONFIG]:SPLIT`."""
    evaluation: list[str] = field(default_factory=list)
    """The same for evaluation; needed unless `evaluation.num_prompts` is 0."""
    template: Literal["chat", "raw"] = "chat"
    """`chat` applies the tokenizer's chat template, `raw` joins the messages' contents."""
    system_prompt: Literal["prime", "none"] = "prime"
    """`prime` puts the published system prompt first (unless the row brings its own)."""
    task_suffix: bool = True
    """Append PRIME's math or code suffix to the question (unless it is there)."""
    abilities: list[str] = field(default_factory=lambda: ["math"])
    """PRIME only: rows of other abilities are dropped and counted (Eurus-2-RL-Data mixes math and code)."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are dropped and counted."""
    max_response_tokens: Count = 3072
    """SFT only: longer answers are dropped and counted."""


@dataclass(kw_only=True, slots=True)
class OwnData(Section):
    """Prompts of your own, made by a function (docs/howto/); PRIME runs only."""

    kind: Literal["own"] = "own"
    factory: Annotated[str, Named("data.factory")]
    """`package.module:function` that makes the prompt source, given a `PromptRequest`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Anything, handed to the factory as it is."""
    abilities: list[str] = field(default_factory=lambda: ["math"])
    """Abilities that your prompts have; the built-in verifier is set up for these."""
    max_prompt_tokens: Count = 1024
    """A longer prompt ends the run: leave such prompts out."""
