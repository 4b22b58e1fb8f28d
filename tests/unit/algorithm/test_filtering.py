"""The accuracy filter and the buffer of groups."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from megatron_prime.algorithm import FilterCounts, GroupCollector, keep_group
from megatron_prime.batch import FinishReason, Group, Prompt, Response
from megatron_prime.config.schema import FilterSection


def group(name: str, rewards: list[float], finish_reason: FinishReason = "stop") -> Group:
    prompt = Prompt(prompt_id=name, text="1+1=", token_ids=(1, 2), ground_truth="2", extra_info={"index": 3})
    response = Response(text="2", token_ids=(5, 6), logprobs=(-0.5, -0.25), finish_reason="stop", weight_version=4)
    last = dataclasses.replace(response, finish_reason=finish_reason)
    responses = tuple(last if i == len(rewards) - 1 else response for i in range(len(rewards)))
    return Group(prompt=prompt, responses=responses, rewards=tuple(rewards))


def collector(**changes) -> GroupCollector:
    num_groups = changes.pop("num_groups", 2)
    return GroupCollector(FilterSection(min_accuracy=0.2, max_accuracy=0.8, **changes), num_groups=num_groups)


def names(groups: list[Group]) -> list[str]:
    return [g.prompt.prompt_id for g in groups]


def test_bounds_are_inclusive_whatever_the_rounding():
    for accuracy in (0.2, sum([0.1] * 2), 1 - 0.8, 0.5, 0.8, 0.1 + 0.7, sum([0.1] * 8)):
        assert keep_group(accuracy, min_accuracy=0.2, max_accuracy=0.8)
    for accuracy in (0.0, 0.1999, 0.8001, 1.0):
        assert not keep_group(accuracy, min_accuracy=0.2, max_accuracy=0.8)


def test_every_group_is_counted_once():
    filtered = collector(drop_truncated=True)
    filtered.add(
        [
            group("kept", [1.0, 0.0, 0.0, 0.0]),
            group("easy", [1.0, 1.0]),
            group("hard", [0.0, 0.0, 0.0]),
            group("cut", [1.0, 0.0], finish_reason="length"),
            group("missing", [1.0]),
            group("gone", []),
        ]
    )
    counts = filtered.take_counts()
    assert counts == FilterCounts(
        num_seen=6, num_kept=1, num_too_easy=1, num_too_hard=1, num_truncated=1, num_missing=2
    )
    assert filtered.counts == FilterCounts()
    assert names(filtered.take()) == ["kept"]


def test_truncated_groups_stay_unless_asked():
    filtered = collector()
    filtered.add([group("cut", [1.0, 0.0], finish_reason="length")])
    assert len(filtered) == 1 and filtered.counts.num_truncated == 0


def test_disabled_filter_keeps_all_that_can_be_compared():
    everything = collector(enabled=False, drop_truncated=True)
    everything.add([group("easy", [1.0, 1.0]), group("cut", [0.0, 0.0], finish_reason="length"), group("one", [1.0])])
    assert names(everything.take(5)) == ["easy", "cut"]
    assert everything.counts.num_missing == 1


def test_surplus_waits_for_the_next_step_in_order():
    buffer = collector()
    buffer.add([group("a", [1.0, 0.0])])
    assert not buffer.is_full
    buffer.add([group("b", [1.0, 0.0]), group("c", [1.0, 0.0])])
    assert buffer.is_full
    assert names(buffer.take()) == ["a", "b"]
    assert not buffer.is_full and len(buffer) == 1
    buffer.add([group("d", [1.0, 0.0])])
    assert names(buffer.take(1)) == ["c"]
    assert names(buffer.take()) == ["d"]
    assert buffer.take() == []


@pytest.mark.parametrize("through", [pickle, json])
def test_resumed_buffer_goes_on_as_if_nothing_had_happened(through):
    buffer = collector()
    buffer.add([group("a", [1.0, 0.0]), group("easy", [1.0, 1.0]), group("b", [0.5, 0.25])])
    state = through.loads(through.dumps(buffer.state_dict()))
    resumed = collector()
    resumed.load_state_dict(state)
    assert resumed.counts == buffer.counts
    assert resumed.take() == buffer.take()
