"""Comparison of outputs and of returned values."""

import pytest

from megatron_prime.verify.code.compare import CHECKERS, same_values


@pytest.mark.parametrize(
    ("checker", "expected", "output", "same"),
    [
        ("tokens", "1 2\n3\n", "1 2 \n3", True),
        ("tokens", "1 2", "1\n2\n", True),
        ("tokens", "1 2", "2 1", False),
        ("tokens", "1 2", "1 2 2", False),
        ("tokens", "YES", "yes", False),
        ("tokens", "0.5", "0.5000001", True),
        ("tokens", "0.5", "0.50001", False),
        ("tokens", "100000.5", "100000.55", True),
        ("tokens", "1e-3", "0.001", True),
        ("tokens", "5", "5.0", False),
        ("tokens", "5.0", "5", True),
        ("tokens", "5.0", "nan", False),
        ("tokens", "1000.0", "1_000", False),
        ("tokens", "1.2.3", "1.2.30", False),
        ("tokens", "", "", True),
        ("tokens", "", "x", False),
        ("lines", "a  b\nc\n", "a  b \nc\n\n\n", True),
        ("lines", "a  b", "a b", False),
        ("lines", " a", "a", False),
        ("unordered_lines", "1 2\n3 4", "3 4\n1  2", True),
        ("unordered_lines", "1 2\n3 4", "1 2\n1 2", False),
        ("unordered_lines", "1 2", "2 1", False),
    ],
)
def test_outputs(checker, expected, output, same):
    assert CHECKERS[checker](expected, output) is same


@pytest.mark.parametrize(
    ("expected", "value", "same"),
    [
        ([1, [2, 3]], (1, (2, 3)), True),
        ([1, 2], [2, 1], False),
        ([1, 2], {1, 2}, False),
        (0.5, 0.5 + 1e-9, True),
        (0.5, 0.6, False),
        (2.0, 2, True),
        (2, 2.0, True),
        (2, 2.0000001, False),
        (True, 1, True),
        ("1", 1, False),
        (1, "1", False),
        (None, None, True),
        (None, 0, False),
        (0, None, False),
        ({"1": [2]}, {1: (2,)}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"true": 1}, {True: 1}, True),
        (1e308, 10**400, False),
        (10**30, 10**30, True),
        (float("nan"), float("nan"), False),
    ],
)
def test_values(expected, value, same):
    assert same_values(expected, value) is same
