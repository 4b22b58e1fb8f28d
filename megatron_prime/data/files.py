"""Prompts and supervised examples from files and Hugging Face datasets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_prime.batch import Prompt, Response, SftExample
from megatron_prime.config.schema import FileData
from megatron_prime.data.order import shuffled_indices
from megatron_prime.data.readers import read_rows
from megatron_prime.data.row_formats import Demonstration, Question, Row, read_demonstration, read_question
from megatron_prime.data.templates import Message, complete_messages, render
from megatron_prime.data.tokenizer import encode, eos_token_id
from megatron_prime.errors import DataError
from megatron_prime.interfaces import DropCounts

Item = TypeVar("Item")

_CHUNK_ROWS = 1024
_EVALUATION_SEED = 0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Text and tokens of a conversation, by the options of the configuration."""

    config: FileData
    tokenizer: PreTrainedTokenizerBase

    def text(self, messages: Sequence[Message], ability: str) -> str:
        complete = complete_messages(
            messages,
            ability=ability,
            system_prompt=self.config.system_prompt,
            task_suffix=self.config.task_suffix,
        )
        return render(self.tokenizer, complete, self.config.template)

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        # A chat template has written the special tokens already.
        return encode(self.tokenizer, texts, special_tokens=self.config.template == "raw")


def _read_all(sources: Sequence[str], read: Callable[[Row, str], Item]) -> Iterator[tuple[str, Item]]:
    for source in sources:
        for where, row in read_rows(source):
            yield where, read(row, where)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, _CHUNK_ROWS)):
        yield chunk


def _warn_of(dropped: DropCounts, sources: Sequence[str]) -> None:
    if dropped.num_dropped:
        _log.warning("%s: left out of %d rows: %s", ", ".join(sources), dropped.num_rows, dropped)


def _prompts(renderer: _Renderer, rows: Sequence[tuple[str, Question]]) -> list[Prompt]:
    texts = [renderer.text(question.messages, question.ability) for _, question in rows]
    return [
        Prompt(
            prompt_id=where,
            text=text,
            token_ids=ids,
            ground_truth=question.ground_truth,
            ability=question.ability,
            data_source=question.data_source,
            extra_info=question.extra_info,
        )
        for (where, question), text, ids in zip(rows, texts, renderer.encode(texts), strict=True)
    ]


def first_prompts(config: FileData, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """The first training prompts of the wanted abilities; reads no further, so that these may be too long to train on.

    Args:
        config: section `data`.
        tokenizer: the policy's.
        count: how many at the most.

    Raises:
        DataError: see `build_prompt_source`.
    """
    rows = _read_all(config.train, read_question)
    wanted = (row for row in rows if row[1].ground_truth and row[1].ability in config.abilities)
    return _prompts(_Renderer(config, tokenizer), list(islice(wanted, count)))


class FilePrompts:
    """Prompts from files (a `PromptSource`).

    Questions stay in memory; text and tokens are made when they are taken.

    Args:
        config: section `data`.
        tokenizer: the policy's.
        seed: seed of the order.

    Raises:
        DataError: see `build_prompt_source`; also where no prompt is left.
    """

    def __init__(self, config: FileData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        self._renderer = _Renderer(config, tokenizer)
        self._seed = seed
        self._evaluation, _ = self._load(config.evaluation, frozenset())
        held_out = frozenset(self._text(question) for _, question in self._evaluation)
        self._training, self.dropped = self._load(config.train, held_out)
        if not self._training:
            raise DataError(f"data.train: no prompt is left of {self.dropped.num_rows}: left out are {self.dropped}")

    def _text(self, question: Question) -> str:
        return self._renderer.text(question.messages, question.ability)

    def _load(self, sources: Sequence[str], held_out: frozenset[str]) -> tuple[list[tuple[str, Question]], DropCounts]:
        kept: list[tuple[str, Question]] = []
        reasons: Counter[str] = Counter()
        values: dict[str, Counter[str]] = {"other_ability": Counter(), "no_answer": Counter()}
        num_rows = 0
        config = self._renderer.config
        for chunk in _chunks(_read_all(sources, read_question)):
            num_rows += len(chunk)
            wanted = [row for row in chunk if row[1].ability in config.abilities]
            reasons.update(["other_ability"] * (len(chunk) - len(wanted)))
            values["other_ability"].update(row[1].ability for row in chunk if row[1].ability not in config.abilities)
            texts = [self._text(question) for _, question in wanted]
            for row, text, ids in zip(wanted, texts, self._renderer.encode(texts), strict=True):
                if not row[1].ground_truth:
                    reasons["no_answer"] += 1
                    values["no_answer"].update([row[1].label] if row[1].label else [])
                elif len(ids) > config.max_prompt_tokens:
                    reasons["too_long"] += 1
                elif text in held_out:
                    reasons["in_evaluation"] += 1
                else:
                    kept.append(row)
        met = {reason: dict(counts) for reason, counts in values.items() if counts}
        dropped = DropCounts(num_rows=num_rows, by_reason={r: n for r, n in reasons.items() if n}, by_value=met)
        _warn_of(dropped, sources)
        return kept, dropped

    def __len__(self) -> int:
        return len(self._training)

    def ground_truths(self, ability: str, count: int) -> dict[str, str]:
        """Truths of up to `count` training rows of an ability, spread over all of them, by where they stand."""
        rows = [row for row in self._training if row[1].ability == ability]
        return {where: question.ground_truth for where, question in rows[:: max(1, -(-len(rows) // count))]}

    def take(self, position: int, count: int) -> list[Prompt]:
        chosen = shuffled_indices(position, count, len(self), self._seed)
        return _prompts(self._renderer, [self._training[index] for index in chosen])

    def evaluation(self, count: int) -> list[Prompt]:
        if not self._evaluation:
            raise DataError("data.evaluation: no prompts; name evaluation files")
        length = len(self._evaluation)
        # Not the run's seed: runs with different seeds are compared on the same prompts.
        chosen = shuffled_indices(0, min(count, length), length, _EVALUATION_SEED)
        return _prompts(self._renderer, [self._evaluation[index] for index in chosen])

    def step_spans(self, prompt: Prompt, response: Response) -> None:
        return None


class FileSft:
    """Supervised examples from files (an `SftSource`); arguments and errors as in `FilePrompts`."""

    def __init__(self, config: FileData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        self._renderer = _Renderer(config, tokenizer)
        self._seed = seed
        self._end_token = eos_token_id(tokenizer)
        self._kept: list[Demonstration] = []
        reasons: Counter[str] = Counter()
        num_rows = 0
        for chunk in _chunks(_read_all(config.train, read_demonstration)):
            rows = [row for _, row in chunk]
            num_rows += len(rows)
            for row, example in zip(rows, self._examples(rows), strict=True):
                if len(example.prompt_token_ids) > config.max_prompt_tokens:
                    reasons["too_long"] += 1
                elif len(example.response_token_ids) > config.max_response_tokens:
                    reasons["response_too_long"] += 1
                else:
                    self._kept.append(row)
        self.dropped = DropCounts(num_rows=num_rows, by_reason=dict(reasons))
        _warn_of(self.dropped, config.train)
        if not self._kept:
            raise DataError(f"data.train: no example is left of {num_rows}: left out are {self.dropped}")

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, position: int, count: int) -> list[SftExample]:
        return self._examples([self._kept[i] for i in shuffled_indices(position, count, len(self), self._seed)])

    def _examples(self, rows: Sequence[Demonstration]) -> list[SftExample]:
        prompts = self._renderer.encode([self._renderer.text(row.messages, row.ability) for row in rows])
        responses = encode(self._renderer.tokenizer, [row.response for row in rows], special_tokens=False)
        end = (self._end_token,)
        return [
            SftExample(prompt_token_ids=prompt, response_token_ids=response + end)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
