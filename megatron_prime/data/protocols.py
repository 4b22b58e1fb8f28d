"""What the trainer knows of a data source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from megatron_prime.batch import Prompt, Response, SftExample, StepSpan

_REASONS = {
    "too_long": "with prompts of more than data.max_prompt_tokens",
    "response_too_long": "with responses of more than data.max_response_tokens",
    "no_answer": "without an answer to check against",
    "in_evaluation": "whose prompts are among data.evaluation",
    "other_ability": "of an ability that is not in data.abilities",
}


_MAX_VALUES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class DropCounts:
    """Rows that a source leaves out."""

    num_rows: int
    """Rows read, with those left out."""
    by_reason: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by the keys of `_REASONS`."""
    by_value: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of some reasons, what the rows had in the decisive place."""

    @property
    def num_dropped(self) -> int:
        """Rows left out for any reason."""
        return sum(self.by_reason.values())

    def __str__(self) -> str:
        """What was left out and why, with the keys of the configuration that decide it."""
        return "; ".join(
            f"{count} {_REASONS[reason]}{self._met(reason)}" for reason, count in self.by_reason.items()
        ) or ("nothing")

    def _met(self, reason: str) -> str:
        values = sorted(self.by_value.get(reason, {}).items(), key=lambda entry: -entry[1])
        shown = ", ".join(f"'{value}' {count}" for value, count in values[:_MAX_VALUES])
        return f" ({shown}{', ..' if len(values) > _MAX_VALUES else ''})" if shown else ""


class PromptSource(Protocol):
    """Prompts in a seeded order, addressed by their position since the start of training."""

    @property
    def dropped(self) -> DropCounts:
        """What was left out of the training prompts."""
        ...

    def __len__(self) -> int:
        """Prompts of an epoch."""
        ...

    def take(self, position: int, count: int) -> list[Prompt]:
        """Prompts `position` .. `position + count - 1` since the start of training; each epoch has its own order."""
        ...

    def evaluation(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts, the same in every run; fewer where there are fewer."""
        ...

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...] | None:
        """The steps of a response and which are right; None where the source cannot know."""
        ...


class SftSource(Protocol):
    """Supervised examples, addressed in the same way."""

    @property
    def dropped(self) -> DropCounts:
        """What was left out."""
        ...

    def __len__(self) -> int:
        """Examples of an epoch."""
        ...

    def take(self, position: int, count: int) -> list[SftExample]:
        """Examples `position` .. `position + count - 1` since the start of training."""
        ...
