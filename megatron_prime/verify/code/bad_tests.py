"""Finds tests that say nothing: unreadable ones, ones that fail by themselves, and ones that wrong programs pass."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from megatron_prime.batch import Prompt, Response
from megatron_prime.interfaces import Verifier
from megatron_prime.verify.code.problem import AssertTests, CallTests, OutputTests, Problem, ProblemError, parse_problem
from megatron_prime.verify.code.sandbox.names import entry_name, sort_names
from megatron_prime.verify.futures import verify

_FUNCTION = "def {name}(*arguments, **keywords):\n    return {result}\n"
_CLASS = """class {name}:
    def __init__(self, *arguments, **keywords):
        pass

    def __getattr__(self, name):
        return lambda *arguments, **keywords: {result}
"""
_RESULTS = ("None", "0", "True")
_OUTPUTS = ("", "print(0)\n")


def wrong_programs(problem: Problem) -> list[str]:
    """Programs that do nothing of what is asked: they print or return the same for every input."""
    if isinstance(problem, OutputTests):
        return list(_OUTPUTS)
    names = {problem.fn_name} if isinstance(problem, CallTests) else _names(problem)
    return ["".join(_defined(name, result) for name in sorted(names)) for result in _RESULTS]


def _names(problem: AssertTests) -> set[str]:
    entry = entry_name(problem.entry_point)
    try:
        trees = [ast.parse(text) for text in (problem.setup, *problem.pieces)]
    except (SyntaxError, ValueError, RecursionError):
        return set()
    found = sort_names(trees, problem.prefix, entry)
    imported = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in found.solution
    }
    return {*found.program.values(), *imported, *([entry] if entry else [])}


def _defined(name: str, result: str) -> str:
    return (_CLASS if name[:1].isupper() else _FUNCTION).format(name=name, result=result)


def what_is_wrong(ground_truth: str) -> str | None:
    """What can be known of a problem's tests without running them; None where they can be read."""
    try:
        parse_problem(ground_truth)
    except ProblemError as error:
        return str(error)
    return None


def find_bad_tests(verifier: Verifier, truths: Mapping[str, str]) -> dict[str, str]:
    """Runs wrong programs against tests.

    Args:
        verifier: of programs.
        truths: tests by where they stand.

    Returns:
        Where tests are bad, and why.
    """
    found: dict[str, str] = {}
    cases: list[tuple[str, str]] = []
    for where, truth in truths.items():
        try:
            problem = parse_problem(truth)
        except ProblemError as error:
            found[where] = str(error)
            continue
        cases += [(where, program) for program in wrong_programs(problem)]
    verdicts = verify(verifier, [_item(truths[where], program) for where, program in cases])
    for (where, program), verdict in zip(cases, verdicts, strict=True):
        if verdict.status == "bad_tests":
            found.setdefault(where, verdict.reason or "they cannot be used")
        elif verdict.status == "pass":
            found.setdefault(where, f"a program that does nothing passes: {program.strip()[:60]!r}")
    return found


def _item(truth: str, program: str) -> tuple[Prompt, Response]:
    prompt = Prompt(prompt_id="tests", text="", token_ids=(), ground_truth=truth, ability="code")
    text = f"```python\n{program}\n```"
    return prompt, Response(text=text, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)


def told(found: Mapping[str, str], num_problems: int, max_examples: int = 3) -> str:
    """The findings in one line."""
    examples: Sequence[str] = [f"{where}: {reason}" for where, reason in list(found.items())[:max_examples]]
    return f"{len(found)} of {num_problems} problems with programs have bad tests ({'; '.join(examples)})"
