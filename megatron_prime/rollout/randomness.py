"""Counter-based uniforms: the randomness of an answer is a function of its key and the position alone.

Unlike a generator object per answer, one vectorised expression serves a whole batch, and no state has to
follow an answer when the batch around it changes.
"""

from __future__ import annotations

import hashlib

import torch


def _wrap(value: int) -> int:
    """The unsigned 64-bit pattern as the int64 that torch computes with."""
    return value - (1 << 64) if value >= 1 << 63 else value


# Constants of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_GAMMA = _wrap(0x9E3779B97F4A7C15)
_MIX_1 = _wrap(0xBF58476D1CE4E5B9)
_MIX_2 = _wrap(0x94D049BB133111EB)


def answer_key(seed: int, prompt_id: str, answer: int) -> int:
    """Derives the 64-bit key of one answer.

    Args:
        seed: of the whole `generate` call.
        prompt_id: stable name of the prompt.
        answer: number of the answer among those of its prompt.

    Returns:
        A key in the range of int64, equal on every machine and in every process.
    """
    digest = hashlib.blake2b(f"{seed}/{answer}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draws one number per row with SplitMix64.

    Args:
        keys: int64 [n], from `answer_key`.
        positions: int64 [n], index of the token to be drawn in its answer.

    Returns:
        float64 [n], multiples of 2**-52 in [0, 1): with 52 bits (not 53) the product with any positive
        float64 is strictly below that float64, which the inverse CDF relies on.
    """
    z = keys + (positions + 1) * _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 12).to(torch.float64) * 2.0**-52


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own is arithmetic on int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
