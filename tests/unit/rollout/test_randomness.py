"""The counter-based generator against plain Python integers and against uniformity."""

import torch

from megatron_prime.rollout.randomness import answer_key, uniforms

_MASK = (1 << 64) - 1


def slow_splitmix(key: int, position: int) -> int:
    """SplitMix64 as published, on Python's unbounded integers: output number ``position`` of state ``key``."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_published_value() -> None:
    # First output of the reference implementation for state 1234567.
    assert slow_splitmix(1234567, 0) == 6457827717110365317


def test_equals_python_integers() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), answer_key(3, "p", 4)]
    positions = [0, 1, 31, 2**20, 5, 7]
    drawn = uniforms(torch.tensor(keys), torch.tensor(positions))
    expected = [(slow_splitmix(k & _MASK, p) >> 12) * 2.0**-52 for k, p in zip(keys, positions, strict=True)]
    assert drawn.tolist() == expected


def test_keys_differ_in_every_argument_and_are_stable() -> None:
    assert answer_key(1, "a", 2) == answer_key(1, "a", 2) == -8931975004809062422
    keys = {answer_key(s, p, k) for s in range(10) for p in ("", "1", "11", "1/1", "a") for k in range(12)}
    assert len(keys) == 600


def test_uniform_and_uncorrelated() -> None:
    keys = torch.tensor([answer_key(0, "p", k) for k in range(1000)])
    drawn = torch.stack([uniforms(keys, torch.full((1000,), t)) for t in range(100)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=64, min=0, max=1)
    expected = drawn.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 32 < chi_square < 104  # 63 degrees of freedom: 0.001 and 0.999 quantiles
    centred = (drawn - 0.5) * 12**0.5
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(product.mean().item()) < 4 / product.numel() ** 0.5
