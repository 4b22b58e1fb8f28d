"""The program in a response."""

import pytest

from megatron_prime.verify.code.extract import extract_code

FENCE = "```"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("first\n```python\nprint(1)\n```\nthen\n```python\nprint(2)\n```\ndone", "print(2)\n"),
        ("```python\nprint(1)\n```\nruns like this:\n```\n1\n```", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```Python3\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)```", "print(1)"),
        ("```python\nprint(1)\n", "print(1)\n"),
        ("```python print(1)```", "print(1)"),
        ("```python  \n  x = 1\n```", "  x = 1\n"),
        ("text\n```\nprint(1)\n```\n", "print(1)\n"),
        ("```text\nhello\n```\n```cpp\nint x;\n```", "int x;\n"),
        ("```pythonic\nno\n```", "no\n"),
        ("", None),
        ("print(1)", None),
        ("```\nnever closed", None),
        ("`print(1)`", None),
    ],
)
def test_takes_the_last_python_block(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize("text", [FENCE * 300_000, f"{FENCE}python " * 200_000, "`" * 10**6, f"\n{FENCE}py" * 200_000])
def test_takes_linear_time(text):
    extract_code(text)
