"""From a row of each benchmark's published file to a question with PRIME's wording.

Wordings are those of PRIME's evaluation scripts (PRIME-RL/PRIME, ``eval/``, Apache-2.0) and, for LiveCodeBench, of its
own runner (LiveCodeBench/LiveCodeBench, MIT); docs/reference/evaluation.md lists where ours differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_prime.data.row_formats import Question, Row, read_question
from megatron_prime.errors import DataError

_LEETCODE_IMPORTS = """\
import math, re, sys, copy, datetime, itertools, collections, heapq, functools, hashlib, string
import numpy, numpy as np
from typing import *
from collections import *
from functools import *
"""
_DEFINITION = re.compile(r"^[ \t]*def[ \t]+(.*?)[ \t]*:?[ \t]*(?:#.*)?$", re.MULTILINE)


def read_math(row: Row, where: str) -> Question:
    """`problem` or `question` with `answer`, `expected_answer` or a boxed `solution`."""
    question = read_question(row, where)
    if not question.ground_truth:
        raise DataError(f"{where}: no answer; expected answer, expected_answer, or solution with \\boxed{{..}}")
    return question


def read_aime24(row: Row, where: str) -> Question | None:
    """PRIME's file holds AIME 2022 to 2024; those of 2024 are recognised by their address."""
    return read_math(row, where) if "2024" in str(row.get("url", "2024")) else None


def read_olympiadbench(row: Row, where: str) -> Question:
    """`question` with a list `final_answer`; one problem states a tolerance, which goes to `extra_info`."""
    answers = row.get("final_answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{where}: final_answer must be a list of texts; is this OlympiadBench (OE_TO_maths_en_COMP)?")
    try:
        extra_info = {"tolerance": float(row["error"])} if row.get("error") else {}
    except ValueError as error:
        raise DataError(f"{where}: error must be a number or null, found {row['error']!r}") from error
    messages = ({"role": "user", "content": _text(row, "question", where)},)
    return Question(messages=messages, ground_truth=", ".join(answers), extra_info=extra_info)


def read_humaneval(row: Row, where: str) -> Question:
    """`prompt`, `entry_point`, `test`; what the program leaves out of the prompt is put before it."""
    prompt, entry_point = _text(row, "prompt", where), _text(row, "entry_point", where)
    found = re.search(rf"def\s+({re.escape(entry_point)}.*?):\s*\n", prompt)
    if found is None:
        raise DataError(f"{where}: the prompt does not define {entry_point}")
    content = (
        "Write Python code to solve the task.\n"
        f"Write a Python function `{found.group(1)}` to solve the following problem: Present code in ```python```\n"
        f"```python\n{prompt}\n```\n"
    )
    tests = {"assert_code": _text(row, "test", where), "entry_point": entry_point, "prefix_code": prompt}
    return code_question(content, tests, statement=prompt)


def read_mbpp(row: Row, where: str) -> Question:
    """`prompt`, `code`, `test_list`, `test_imports` (the sanitized MBPP)."""
    definition = _DEFINITION.search(_text(row, "code", where))
    tests = row.get("test_list")
    if definition is None or not isinstance(tests, list) or not tests:
        raise DataError(f"{where}: expected code that defines a function, and test_list")
    signature = definition.group(1).replace(" ", "").replace(",", ", ")
    description = _text(row, "prompt", where).split(" https://www.")[0]
    content = (
        "Write Python code to solve the task.\n"
        f"Write a Python function `{signature}` to solve the following problem: "
        "Present code in ```python and ```\n"
        f"{description}\nThe code should pass the following test cases:>>> {tests[0]}\n\n Let's coding step by step.\n"
    )
    truth = {"assert_code": tests, "setup_code": "\n".join(row.get("test_imports") or ())}
    return code_question(content, truth, statement=description)


def read_leetcode(row: Row, where: str) -> Question:
    """`prompt_sft` and `test`, a script of assertions."""
    tests = {"assert_code": _text(row, "test", where), "prefix_code": _LEETCODE_IMPORTS}
    statement = _text(row, "prompt_sft", where)
    return code_question(statement, tests, statement=statement)


def livecodebench_wording(question: str, starter_code: str) -> str:
    """The generic question of LiveCodeBench's runner."""
    if starter_code:
        how = "You will use the following starter code to write the solution to the problem and enclose your code "
        how += f"within delimiters.\n```python\n{starter_code}\n```\n\n"
    else:
        how = "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on "
        how += (
            "the sample inputs). Enclose your code within delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n"
        )
    return f"### Question:\n{question}\n\n### Format: {how}### Answer: (use the provided format with backticks)\n\n"


def code_question(content: str, tests: Mapping[str, Any], *, statement: str) -> Question:
    """A question for a program.

    Args:
        content: what is asked.
        tests: in a form of the code verifier.
        statement: the problem without the benchmark's wording, for finding it in training data.
    """
    messages = ({"role": "user", "content": content},)
    extra_info = {"statement": statement}
    return Question(messages=messages, ground_truth=json.dumps(tests), ability="code", extra_info=extra_info)


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be text; found columns {', '.join(row)}")
    return value
