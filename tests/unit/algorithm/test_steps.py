"""Steps between delimiters: by hand, and against a loop over random responses."""

import torch

from megatron_prime.algorithm.steps import step_index, step_sums, to_tokens

D, E = 7, 1  # delimiter, end token


def rows(*ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, ids))
    mask = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
    return torch.tensor([row + [D] * (width - len(row)) for row in ids]), mask


def test_steps_end_with_their_delimiters():
    ids, mask = rows([5, 5, D, 5, D, 5, E], [5, D, E], [5, E], [D, D, 5, D, D, 5, 5], [D])
    assert step_index(ids, mask, [D]).tolist() == [
        [0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, -1, -1, -1, -1],
        [0, 0, -1, -1, -1, -1, -1],
        [0, 0, 1, 1, 1, 2, 2],
        [0, -1, -1, -1, -1, -1, -1],
    ]


def test_several_delimiters_and_none():
    ids, mask = rows([5, 8, 5, D, 5, E])
    assert step_index(ids, mask, [D, 8]).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert step_index(ids, mask, []).tolist() == [[0] * 6]


def slow_steps(ids: list[int]) -> list[list[int]]:
    """Token positions of every step."""
    steps: list[list[int]] = [[]]
    for place, token in enumerate(ids):
        after_delimiter = place > 0 and ids[place - 1] == D and token != D
        if after_delimiter and place < len(ids) - 1:
            steps.append([])
        steps[-1].append(place)
    return steps


def test_sums_and_spreading_agree_with_a_loop():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (40,), generator=generator)
    drawn = torch.randint(5, 9, (40, 12), generator=generator)
    ids, mask = rows(*[row[:n].tolist() for row, n in zip(drawn, lengths, strict=True)])
    values = torch.randn(ids.shape, generator=generator, dtype=torch.float64).masked_fill(~mask, torch.nan)
    index = step_index(ids, mask, [D])
    sums, present = step_sums(values, index)
    spread = to_tokens(sums, index)
    for i, n in enumerate(lengths.tolist()):
        steps = slow_steps(ids[i, :n].tolist())
        expected = [sum(values[i, t].item() for t in step) for step in steps]
        assert present[i].tolist() == [s < len(steps) for s in range(present.shape[1])]
        torch.testing.assert_close(sums[i, : len(steps)], torch.tensor(expected, dtype=torch.float64))
        assert not sums[i, len(steps) :].any() and not spread[i, n:].any()
        for total, step in zip(expected, steps, strict=True):
            assert all(abs(spread[i, t].item() - total) < 1e-12 for t in step)


def test_gradients_reach_every_token_of_a_step():
    ids, mask = rows([5, D, 5, E])
    values = torch.zeros(1, 4, requires_grad=True)
    sums, _ = step_sums(values, step_index(ids, mask, [D]))
    (sums * torch.tensor([[2.0, 3.0]])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[2.0, 2.0, 3.0, 3.0]]
