"""From groups of answers to the padded tensors of a batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_prime.batch import Group, Prompt, Response, RolloutBatch


def answer(*token_ids: int, version: int = 3, spans_versions: bool = False) -> Response:
    return Response(
        text="",
        token_ids=token_ids,
        logprobs=tuple(-token / 8 for token in token_ids),
        finish_reason="stop",
        weight_version=version,
        spans_versions=spans_versions,
    )


def group(prompt_ids: tuple[int, ...], *answers: tuple[Response, float]) -> Group:
    prompt = Prompt(prompt_id="p", text="", token_ids=prompt_ids, ground_truth="")
    return Group(prompt=prompt, responses=tuple(a for a, _ in answers), rewards=tuple(r for _, r in answers))


GROUPS = [
    group((1, 2), (answer(5), 1.0), (answer(6, 7, 8, version=4), 0.0)),
    group((3,), (answer(9, 10, spans_versions=True), 0.5)),
]


def test_rows_come_group_after_group_and_are_padded_on_the_right() -> None:
    batch = RolloutBatch.from_groups(GROUPS)
    assert batch.prompt_token_ids == ((1, 2), (1, 2), (3,))
    assert batch.response_ids.tolist() == [[5, 0, 0], [6, 7, 8], [9, 10, 0]]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert batch.rollout_logprobs.tolist() == [[-0.625, 0, 0], [-0.75, -0.875, -1.0], [-1.125, -1.25, 0]]
    assert batch.outcomes.tolist() == [1.0, 0.0, 0.5]
    assert batch.group_index.tolist() == [0, 0, 1]
    assert (batch.num_responses, batch.num_groups) == (3, 2)
    assert batch.response_ids.dtype == torch.int64 and batch.rollout_logprobs.dtype == torch.float32


def test_an_answer_of_several_versions_has_none() -> None:
    assert RolloutBatch.from_groups(GROUPS).weight_versions.tolist() == [3, 4, -1]


def test_a_batch_of_nothing_has_no_rows_and_no_width() -> None:
    batch = RolloutBatch.from_groups([])
    assert batch.response_ids.shape == batch.mask.shape == (0, 0)
    assert (batch.num_responses, batch.num_groups) == (0, 0)


def test_accuracy_is_the_mean_outcome() -> None:
    assert [g.accuracy for g in GROUPS] == [0.5, 0.5]
    assert group((1,), (answer(5), 1.0), (answer(6), 0.0), (answer(7), 0.25)).accuracy == pytest.approx(1.25 / 3)


def test_what_flows_between_stages_cannot_be_changed_on_the_way() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GROUPS[0].rewards = (0.0, 0.0)  # type: ignore[misc]
