"""Selects the groups worth training on, and buffers them until a step's batch is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_prime.batch import Group, Prompt, Response

if TYPE_CHECKING:
    # The mathematics loads neither YAML nor pydantic.
    from megatron_prime.config.schema import FilterSection

ACCURACY_TOLERANCE = 1e-6
"""The bounds are inclusive: 1 right answer of 5 is 0.2, however the mean was rounded."""
MIN_GROUP_SIZE = 2
"""Below it nothing is left to compare a response with."""


def keep_group(accuracy: float, *, min_accuracy: float, max_accuracy: float) -> bool:
    """Says whether a group is neither too hard nor too easy, min_accuracy <= accuracy <= max_accuracy.

    Source: arXiv 2502.01456, section 3.3 (online prompt filtering); the bounds 0.2 and 0.8 are the released code's.

    Args:
        accuracy: mean outcome of the group, in [0, 1].
        min_accuracy: inclusive lower bound.
        max_accuracy: inclusive upper bound.

    Returns:
        True if the group is worth training on.
    """
    return min_accuracy - ACCURACY_TOLERANCE <= accuracy <= max_accuracy + ACCURACY_TOLERANCE


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterCounts:
    """Counts of groups by fate; every group seen is in exactly one of the other counts."""

    num_seen: int = 0
    num_kept: int = 0
    num_too_easy: int = 0
    num_too_hard: int = 0
    num_truncated: int = 0
    """Dropped because a response hit the length limit."""
    num_missing: int = 0
    """Dropped because verdicts are missing and fewer than two responses are left."""


class GroupCollector:
    """Collects kept groups until a step's batch is full; surplus groups wait for the next step.

    Surplus groups are used with their rollouts, first in first out, so that no group is older than necessary.

    Args:
        section: which groups are kept; not enabled, every group of at least two responses is.
        num_groups: groups of a full batch.
    """

    def __init__(self, section: FilterSection, *, num_groups: int) -> None:
        self.section = section
        self.num_groups = num_groups
        self._groups: list[Group] = []
        self._counts = FilterCounts()

    def __len__(self) -> int:
        """Kept groups that wait."""
        return len(self._groups)

    @property
    def is_full(self) -> bool:
        """Returns whether the waiting groups fill a batch."""
        return len(self._groups) >= self.num_groups

    @property
    def counts(self) -> FilterCounts:
        """Counts of the groups added since the last `take_counts`."""
        return self._counts

    def add(self, groups: Sequence[Group]) -> None:
        """Keeps the groups that are worth training on and counts the others.

        Args:
            groups: verified groups, in the order in which they shall be used.
        """
        for group in groups:
            outcome = self._judge(group)
            if outcome == "num_kept":
                self._groups.append(group)
            changed = {name: getattr(self._counts, name) + 1 for name in ("num_seen", outcome)}
            self._counts = replace(self._counts, **changed)

    def _judge(self, group: Group) -> str:
        """The count that the group belongs to."""
        if len(group.responses) < MIN_GROUP_SIZE:
            return "num_missing"
        section = self.section
        if not section.enabled:
            return "num_kept"
        # Checked before accuracy: a truncated answer counts as wrong and would blur both other counts.
        if section.drop_truncated and any(response.finish_reason != "stop" for response in group.responses):
            return "num_truncated"
        if keep_group(group.accuracy, min_accuracy=section.min_accuracy, max_accuracy=section.max_accuracy):
            return "num_kept"
        return "num_too_easy" if group.accuracy > section.max_accuracy else "num_too_hard"

    def take(self, num_groups: int | None = None) -> list[Group]:
        """Takes the oldest waiting groups; the rest stays for the next step.

        Args:
            num_groups: how many at the most; a full batch where None.

        Returns:
            Groups in the order in which they were added, fewer than asked for if fewer wait.
        """
        count = self.num_groups if num_groups is None else num_groups
        taken, self._groups = self._groups[:count], self._groups[count:]
        return taken

    def take_counts(self) -> FilterCounts:
        """Returns the counts and starts them anew."""
        counts, self._counts = self._counts, FilterCounts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs, in built-in types."""
        return {"groups": [asdict(group) for group in self._groups], "counts": asdict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: the saved state; tuples may have become lists on the way.
        """
        self._groups = [_group_from_dict(group) for group in state["groups"]]
        self._counts = FilterCounts(**state["counts"])


def _group_from_dict(saved: Mapping[str, Any]) -> Group:
    prompt = Prompt(**{**saved["prompt"], "token_ids": tuple(saved["prompt"]["token_ids"])})
    responses = tuple(
        Response(**{**response, "token_ids": tuple(response["token_ids"]), "logprobs": tuple(response["logprobs"])})
        for response in saved["responses"]
    )
    return Group(prompt=prompt, responses=responses, rewards=tuple(saved["rewards"]))
