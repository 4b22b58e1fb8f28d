"""Seeded permutations that need no memory."""

import pytest

from megatron_prime.data.order import shuffled_index


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 257])
def test_every_epoch_is_a_permutation(length):
    for epoch in range(3):
        rows = [shuffled_index(epoch * length + i, length, seed=5) for i in range(length)]
        assert sorted(rows) == list(range(length))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(shuffled_index(epoch * 100 + i, 100, seed) for i in range(100)) for epoch in range(4) for seed in range(4)
    }
    assert len(orders) == 16


def test_looks_random():
    # Sum of squared displacements of a random permutation of n: mean n(n^2-1)/6, about 1/sqrt(n) spread.
    length = 2000
    total = sum((shuffled_index(i, length, 0) - i) ** 2 for i in range(length))
    assert abs(total / (length * (length**2 - 1) / 6) - 1) < 0.1


def test_the_order_never_changes_between_versions():
    assert [shuffled_index(i, 10, seed=1) for i in range(10)] == [6, 8, 3, 1, 5, 4, 9, 7, 2, 0]
