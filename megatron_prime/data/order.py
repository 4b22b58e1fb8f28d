"""Seeded order of an epoch without storing it."""

from __future__ import annotations

from hashlib import blake2b

_NUM_ROUNDS = 4


def shuffled_indices(position: int, count: int, length: int, seed: int) -> list[int]:
    """`shuffled_index` of `count` positions in a row."""
    return [shuffled_index(place, length, seed) for place in range(position, position + count)]


def shuffled_index(position: int, length: int, seed: int) -> int:
    """Returns the dataset row that is the `position`-th since the start of training.

    Each epoch is its own pseudo-random permutation: a Feistel network on the smallest even number of bits that
    covers `length`, walked until it lands below `length` (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Memory and time do not depend on `length`, so a resumed run only needs `position`.

    Args:
        position: rows taken before this one, over all epochs.
        length: rows of an epoch.
        seed: seed of the order.

    Returns:
        A row number below `length`.
    """
    epoch, index = divmod(position, length)
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for number in range(_NUM_ROUNDS):
            digest = blake2b(f"{seed}:{epoch}:{number}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & half_mask)
        index = left << half_bits | right
        if index < length:
            return index
