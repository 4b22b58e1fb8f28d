"""Prompts of the user's own: what their factory is given, a base class for them, and what no source may do to a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_prime.batch import Prompt, Response, StepSpan
from megatron_prime.config.schema import OwnData
from megatron_prime.data.order import shuffled_index
from megatron_prime.data.templates import complete_messages, render
from megatron_prime.data.tokenizer import encode
from megatron_prime.errors import DataError
from megatron_prime.interfaces import DropCounts, PromptSource
from megatron_prime.sockets import resolve


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRequest:
    """What a `data.factory` makes its prompt source from; the same on every rank and after a resume."""

    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    options: Mapping[str, Any]
    """`data.options` as the configuration has it."""
    seed: int
    """`run.seed`, of the order."""
    max_prompt_tokens: int
    """A longer prompt ends the run."""

    def raw_prompt(self, question: str, *, prompt_id: str, ground_truth: str, **fields: Any) -> Prompt:
        """A question as it is, with the tokens that the tokenizer puts around a text.

        Args:
            question: any text.
            prompt_id: stable and unique in the source.
            ground_truth: what the verifier compares answers with.
            **fields: further fields of `Prompt`: ability, data_source, extra_info.
        """
        return self._prompt(question, True, prompt_id=prompt_id, ground_truth=ground_truth, **fields)

    def chat_prompt(
        self, question: str, *, prompt_id: str, ground_truth: str, ability: str = "math", **fields: Any
    ) -> Prompt:
        """A question with PRIME's system prompt and suffix, in the tokenizer's chat template.

        Args:
            question: what the user says.
            prompt_id: stable and unique in the source.
            ground_truth: what the verifier compares answers with.
            ability: chooses suffix and verifier.
            **fields: further fields of `Prompt`: data_source, extra_info.

        Raises:
            DataError: the tokenizer has no chat template, or one that refuses the messages.
        """
        message = {"role": "user", "content": question}
        messages = complete_messages([message], ability=ability, system_prompt="prime", task_suffix=True)
        text = render(self.tokenizer, messages, "chat")
        return self._prompt(text, False, prompt_id=prompt_id, ground_truth=ground_truth, ability=ability, **fields)

    def _prompt(self, text: str, special_tokens: bool, **fields: Any) -> Prompt:
        (token_ids,) = encode(self.tokenizer, [text], special_tokens=special_tokens)
        return Prompt(text=text, token_ids=token_ids, **fields)


class PromptSourceBase(ABC):
    """A prompt source (`interfaces.PromptSource`) that lacks only its prompts: `__len__` and `prompt`.

    Args:
        request: what the factory was given.
    """

    dropped = DropCounts(num_rows=0)
    """Nothing was left out; a source that leaves out rows may count them."""

    def __init__(self, request: PromptRequest) -> None:
        self.request = request

    @abstractmethod
    def __len__(self) -> int:
        """Prompts of an epoch."""

    @abstractmethod
    def prompt(self, index: int) -> Prompt:
        """Prompt number `index` of 0 .. `len(self) - 1`; the same whenever it is asked for."""

    def take(self, position: int, count: int) -> list[Prompt]:
        """Prompts by their position since the start of training, each epoch shuffled anew by the run's seed."""
        places = range(position, position + count)
        return [self.prompt(shuffled_index(place, len(self), self.request.seed)) for place in places]

    def evaluation(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts; there are none unless a source overrides this.

        Raises:
            DataError: always.
        """
        raise DataError(
            "data.factory: the source has no held-out prompts; define evaluation, or set evaluation.num_prompts=0"
        )

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...] | None:
        """The steps of a response and which are right; None: not known."""
        return None


class OwnPrompts:
    """Holds a source of the user's own to what training relies on (a `PromptSource`).

    Args:
        source: has `__len__`, `take` and `evaluation`, and may lack `dropped` and `step_spans`.
        config: section `data`.
        tokenizer: the policy's.

    Raises:
        DataError: the source lacks a method or has no prompts.
    """

    def __init__(self, source: Any, config: OwnData, tokenizer: PreTrainedTokenizerBase) -> None:
        missing = [name for name in ("__len__", "take", "evaluation") if not callable(getattr(source, name, None))]
        if missing:
            raise DataError(
                f"data.factory: what {config.factory} returned has no {' and no '.join(missing)}; derive it from "
                "megatron_prime.PromptSourceBase"
            )
        self._source = source
        self._config = config
        self._vocab_size = 1 + max(tokenizer.get_vocab().values())
        self.dropped: DropCounts = getattr(source, "dropped", DropCounts(num_rows=0))
        if len(source) < 1:
            raise DataError(f"data.factory: {config.factory} has no prompts; its length must be 1 or more")

    def __len__(self) -> int:
        return len(self._source)

    def take(self, position: int, count: int) -> list[Prompt]:
        found = self._checked(f"take({position}, {count})", self._source.take(position, count))
        if len(found) != count:
            raise DataError(
                f"data.factory: {self._config.factory}: take({position}, {count}) gave {len(found)} prompts; begin "
                "the next epoch where one ends"
            )
        return found

    def evaluation(self, count: int) -> list[Prompt]:
        found = self._checked(f"evaluation({count})", self._source.evaluation(count))
        if not 1 <= len(found) <= count:
            raise DataError(
                f"data.factory: {self._config.factory}: evaluation({count}) gave {len(found)} prompts; give from 1 to "
                f"{count}, or set evaluation.num_prompts=0"
            )
        return found

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...] | None:
        find = getattr(self._source, "step_spans", None)
        return None if find is None else find(prompt, response)

    def _checked(self, call: str, prompts: Any) -> list[Prompt]:
        for place, prompt in enumerate(prompts):
            if problem := self._problem_with(prompt):
                raise DataError(f"data.factory: {self._config.factory}: {call}: item {place} {problem}")
        return list(prompts)

    def _problem_with(self, prompt: Any) -> str | None:
        if not isinstance(prompt, Prompt):
            return f"is a {type(prompt).__name__}; give megatron_prime.Prompt"
        if not isinstance(prompt.prompt_id, str) or not prompt.prompt_id:
            return f"has prompt_id {prompt.prompt_id!r}; give it a name of its own"
        ids, limit = prompt.token_ids, self._config.max_prompt_tokens
        if not ids or not all(isinstance(token, int) and 0 <= token < self._vocab_size for token in ids):
            return f"({prompt.prompt_id}) has no token_ids of the tokenizer's; encode its text"
        if len(ids) > limit:
            return (
                f"({prompt.prompt_id}) has {len(ids)} tokens, above data.max_prompt_tokens = {limit}; leave it out, or "
                "raise the limit"
            )
        if not isinstance(prompt.ground_truth, str):
            return f"({prompt.prompt_id}) has ground_truth {prompt.ground_truth!r}; give text"
        return None


def make_own_prompts(config: OwnData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PromptSource:
    """What ``data.factory`` makes; arguments as for `build_prompt_source`.

    Raises:
        ConfigError: the name cannot be resolved.
        DataError: it makes no prompt source. What it raises itself comes through, with its traceback.
    """
    request = PromptRequest(
        tokenizer=tokenizer, options=config.options, seed=seed, max_prompt_tokens=config.max_prompt_tokens
    )
    return OwnPrompts(resolve("data.factory", config.factory)(request), config, tokenizer)
