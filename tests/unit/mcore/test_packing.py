"""From the whole batch to micro-batches and back, against slow loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_rows import LENGTHS, make_rows, slow_cells

from megatron_prime.batch import Group, Prompt, Response, RolloutBatch, SftExample
from megatron_prime.config.schema import ModelSection, ParallelSection
from megatron_prime.mcore.packing import (
    MicroBatch,
    TokenRows,
    build_micro_batch,
    cut_micro_batches,
    sequence_multiple,
    shard_rows,
    split_minibatches,
)


def cells_of(micro: MicroBatch, line: int) -> list[tuple[int, int, int, bool]]:
    """As `slow_cells`; where no response token follows there is no target."""
    targets = torch.zeros_like(micro.input_ids).masked_scatter(micro.predicts, micro.targets)
    fields = (micro.input_ids, micro.position_ids, targets, micro.predicts)
    return list(zip(*(field[line].tolist() for field in fields), strict=True))


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, data=st.data(), multiple_of=st.sampled_from([1, 2, 4]))
def test_packed_layout(lengths, data, multiple_of) -> None:
    rows = make_rows(lengths)
    chosen = data.draw(st.permutations(range(len(lengths))))[:5]
    micro = build_micro_batch(rows, chosen, packed=True, multiple_of=multiple_of)
    expected = [cell for row in chosen for cell in slow_cells(rows, row)]
    num_padding = -len(expected) % multiple_of
    expected += [(0, position, 0, False) for position in range(num_padding)]
    assert micro.packed and micro.input_ids.shape == (1, len(expected))
    assert cells_of(micro, 0) == expected
    sequences = [len(slow_cells(rows, row)) for row in chosen]
    assert list(micro.lengths) == sequences + [num_padding] * (num_padding > 0)


@pytest.mark.parametrize(
    ("fp8", "sequence_parallel", "expected"),
    [(None, False, 1), (None, True, 4), ("hybrid", False, 16), ("e4m3", True, 64)],
)
def test_rows_of_fp8_products_come_in_sixteens(fp8, sequence_parallel: bool, expected: int) -> None:
    parallel = ParallelSection(world_size=4, tensor_model_parallel_size=4, sequence_parallel=sequence_parallel)
    multiple = sequence_multiple(ModelSection(path="none", fp8=fp8), parallel)
    assert multiple == expected
    for packed in (False, True):
        micro = build_micro_batch(make_rows([(3, 4), (2, 5)]), [0, 1], packed=packed, multiple_of=multiple)
        assert micro.input_ids.shape[1] % multiple == 0


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, multiple_of=st.sampled_from([1, 2, 4]))
def test_padded_layout(lengths, multiple_of) -> None:
    rows = make_rows(lengths)
    micro = build_micro_batch(rows, range(len(lengths)), packed=False, multiple_of=multiple_of)
    longest = max(sum(pair) - 1 for pair in lengths)
    width = -(-longest // multiple_of) * multiple_of
    assert not micro.packed and micro.input_ids.shape == (len(lengths), width)
    for row in range(len(lengths)):
        cells = slow_cells(rows, row)
        assert cells_of(micro, row) == cells + [(0, position, 0, False) for position in range(len(cells), width)]
    assert list(micro.lengths) == [sum(pair) - 1 for pair in lengths]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, packed=st.booleans(), data=st.data())
def test_flat_tokens_know_their_place(lengths, packed, data) -> None:
    rows = make_rows(lengths)
    chosen = data.draw(st.permutations(range(len(lengths))))[:5]
    micro = build_micro_batch(rows, chosen, packed=packed, multiple_of=1)
    # The labels at the predicting positions are the response tokens, in the order of `take`.
    assert micro.targets.tolist() == micro.take(rows.response_ids).tolist()
    assert micro.take(rows.mask).all() and len(micro.rows) == int(rows.mask[list(chosen)].sum())
    assert micro.unique_rows().tolist() == list(chosen)
    back = micro.to_rows(micro.take(rows.response_ids), rows.mask.shape[1])
    assert torch.equal(back, rows.response_ids[list(chosen)])


def test_to_rows_passes_gradients_to_the_tokens_alone() -> None:
    rows = make_rows([(2, 3), (1, 1), (4, 2)])
    micro = build_micro_batch(rows, [2, 0], packed=True, multiple_of=4)
    flat = torch.randn(5, dtype=torch.float64, requires_grad=True)
    spread = micro.to_rows(flat, 3)
    assert spread.tolist() == [[flat[0].item(), flat[1].item(), 0.0], flat[2:].tolist()]
    upstream = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    (grad,) = torch.autograd.grad(spread, flat, upstream)
    assert grad.tolist() == [0.0, 1.0, 3.0, 4.0, 5.0]


def test_rows_of_rollouts_and_of_examples_are_the_same() -> None:
    prompt = Prompt(prompt_id="p", text="", token_ids=(1, 2), ground_truth="")
    answers = [(5,), (6, 7, 8)]
    responses = tuple(
        Response(text="", token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop", weight_version=0)
        for ids in answers
    )
    batch = RolloutBatch.from_groups([Group(prompt=prompt, responses=responses, rewards=(0.0, 1.0))])
    examples = [SftExample(prompt_token_ids=(1, 2), response_token_ids=ids) for ids in answers]
    for rows in (TokenRows.from_rollout(batch), TokenRows.from_examples(examples)):
        assert rows.prompt_token_ids == ((1, 2), (1, 2))
        assert rows.response_ids.tolist() == [[5, 0, 0], [6, 7, 8]]
        assert rows.mask.tolist() == [[True, False, False], [True, True, True]]
        assert rows.input_lengths() == [2, 4]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), num_shards=st.integers(1, 8), data=st.data())
def test_shards_are_complete_balanced_and_sorted(lengths, num_shards, data) -> None:
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    shards = shard_rows(lengths, rows, num_shards)
    assert sorted(row for shard in shards for row in shard) == sorted(rows)
    loads = [sum(lengths[row] for row in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(lengths[row] for row in rows)
    assert all(shards) or len(rows) < num_shards
    assert all(shard == sorted(shard, key=lambda row: (-lengths[row], row)) for shard in shards)
    assert shards == shard_rows(lengths, sorted(rows), num_shards)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 80), by_tokens=st.booleans())
def test_cuts_keep_the_limit_and_are_as_long_as_it_allows(lengths, limit, by_tokens) -> None:
    rows = list(range(len(lengths)))[::-1]
    cuts = cut_micro_batches(
        lengths,
        rows,
        micro_batch_size=None if by_tokens else limit,
        micro_batch_tokens=limit if by_tokens else None,
    )

    def size(cut: list[int]) -> int:
        return sum(lengths[row] for row in cut) if by_tokens else len(cut)

    assert [row for cut in cuts for row in cut] == rows
    assert all(size(cut) <= limit or len(cut) == 1 for cut in cuts)
    assert all(size([*cut, following[0]]) > limit for cut, following in pairwise(cuts))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    num_minibatches=st.integers(1, 15),
    seed=st.integers(0, 2**62),
    shuffle=st.randoms(use_true_random=False),
)
def test_minibatches_keep_groups_whole(sizes, num_minibatches, seed, shuffle) -> None:
    labels = [group for group, size in enumerate(sizes) for _ in range(size)]
    shuffle.shuffle(labels)
    group_index = torch.tensor(labels)
    parts = split_minibatches(group_index, num_minibatches, seed)
    assert len(parts) == min(num_minibatches, len(sizes))
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    groups = [{labels[row] for row in part} for part in parts]
    assert sum(map(len, groups)) == len(sizes)  # no group is in two parts
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert parts == split_minibatches(group_index, num_minibatches, seed)


def test_minibatch_order_follows_the_seed() -> None:
    group_index = torch.arange(20).repeat_interleave(2)
    assert split_minibatches(group_index, 4, seed=1) != split_minibatches(group_index, 4, seed=2)


@pytest.mark.parametrize("packed", [True, False])
def test_row_order_is_the_callers(packed: bool) -> None:
    rows = make_rows([(1, 2), (3, 1), (2, 2)])
    micro = build_micro_batch(rows, [1, 2, 0], packed=packed, multiple_of=1)
    assert micro.rows.tolist() == [1, 2, 2, 0, 0]
    assert micro.columns.tolist() == [0, 0, 1, 0, 1]
