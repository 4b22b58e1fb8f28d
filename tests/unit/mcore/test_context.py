"""Every token is computed by one context-parallel rank, and every answer reaches one rank whole."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_rows import LENGTHS, make_rows, slow_cells

from megatron_prime.mcore.context import zigzag_places
from megatron_prime.mcore.packing import MicroBatch, TokenRows, build_micro_batch


def parts(rows: TokenRows, size: int, *, packed: bool, multiple_of: int) -> tuple[MicroBatch, list[MicroBatch]]:
    """The micro-batch of one rank alone, and those of `size` context-parallel ranks."""
    chosen = range(rows.mask.shape[0])
    options = {"packed": packed, "multiple_of": multiple_of}
    every = [build_micro_batch(rows, chosen, **options, context_rank=r, context_size=size) for r in range(size)]
    return build_micro_batch(rows, chosen, **options), every


def received(every: list[MicroBatch], rank: int, sent: list[torch.Tensor]) -> torch.Tensor:
    """What the exchange gives a rank, with a loop over the senders."""
    arrived = []
    for sender, values in zip(every, sent, strict=True):
        counts = sender.context.send_counts
        before = sum(counts[:rank])
        arrived.append(values[sender.context.send_order][before : before + counts[rank]])
    assert tuple(map(len, arrived)) == every[rank].context.receive_counts
    return torch.cat(arrived)[every[rank].context.receive_order]


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, size=st.sampled_from([2, 3, 4]), packed=st.booleans(), multiple_of=st.sampled_from([1, 2, 4]))
def test_all_ranks_together_do_what_one_does(lengths, size, packed, multiple_of) -> None:
    rows = make_rows(lengths)
    whole, every = parts(rows, size, packed=packed, multiple_of=multiple_of)
    local_shape = every[0].input_ids.shape
    assert local_shape[1] % multiple_of == 0
    # Every real token, with its position, is on one rank.
    cells = [
        (int(token), int(position))
        for part in every
        for token, position in zip(part.input_ids.flatten(), part.position_ids.flatten(), strict=True)
        if token != 0
    ]
    wanted = [cell[:2] for row in range(len(lengths)) for cell in slow_cells(rows, row)]
    assert sorted(cells) == sorted(wanted)
    # Every response token is predicted from the token before it, on the rank that owns the answer.
    sent = [part.input_ids[part.predicts] for part in every]
    owned: list[tuple[int, int]] = []
    for rank, part in enumerate(every):
        assert part.input_ids.shape == local_shape
        before = received(every, rank, sent).tolist()
        pairs = list(zip(before, part.targets.tolist(), strict=True))
        slow = [(t, n) for row in part.unique_rows().tolist() for t, _, n, p in slow_cells(rows, row) if p]
        assert pairs == slow
        assert part.take(rows.response_ids).tolist() == part.targets.tolist()
        owned += pairs
    assert sorted(n for _, n in owned) == sorted(whole.targets.tolist())


def test_ranks_have_the_same_work_under_a_causal_mask() -> None:
    work = [int((zigzag_places([48], rank, 4) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1
