"""Whose a name in the tests is: read from their text alone."""

from __future__ import annotations

import ast
import math

import pytest

from megatron_prime.verify.code.sandbox import names
from megatron_prime.verify.code.sandbox.names import (
    BrokenTests,
    Names,
    entry_name,
    has_classes,
    sort_names,
    without_solution_imports,
)


def sort(tests: str, prefix: str = "", entry: str | None = None) -> Names:
    return sort_names([ast.parse(tests)], prefix, entry)


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        ("assert f(1) == 2", {"f": "f"}),
        ("assert f(g(1)) == 2", {"f": "f", "g": "g"}),
        ("from solution import f as h\nassert h(1) == 2", {"h": "f"}),
        ("def check(candidate): assert candidate(1)\ncheck(f)", {"f": "f"}),
        ("x = 3\nassert f(x) == x", {"f": "f"}),
        ("assert f([y for y in range(3)]) == max(1, 2)", {"f": "f"}),
        # It is in the library, and it is what the tests are about.
        ("assert gcd(2, 4) == 2", {"gcd": "gcd"}),
        # Nothing but built-in names: the first one that is called.
        ("assert sorted([2, 1]) == list((1, 2))", {"sorted": "sorted"}),
    ],
)
def test_what_nobody_else_defines_is_the_programs(tests: str, program: dict[str, str]) -> None:
    assert sort(tests).program == program


def test_with_an_entry_point_everything_else_is_nobodys() -> None:
    found = sort("assert f(g(1)) == math.pi", entry="f")
    assert (found.program, found.undefined, found.objects) == ({"f": "f"}, frozenset({"g"}), {"math": math})
    assert sort("assert other(1)", entry="f").program == {}


def test_forgotten_imports_are_the_librarys_where_another_name_is_the_programs() -> None:
    found = sort("assert f(1) == sqrt(4) + math.pi")
    assert found.program == {"f": "f"}
    assert found.objects == {"sqrt": math.sqrt, "math": math}


def test_what_the_prefix_defines_is_looked_up_there_and_never_in_the_program() -> None:
    prefix = "def helper(x):\n    return x\n\ndef f(x):\n    ...\n\nLIMIT = 3\n"
    found = sort("assert f(helper(LIMIT)) == 3", prefix)
    assert (found.program, found.helpers) == ({"f": "f"}, frozenset({"helper", "LIMIT"}))
    assert sort("assert f(1)", "this is no Python").program == {"f": "f"}


def test_imports_of_the_program_are_taken_out_wherever_they_stand() -> None:
    tree = ast.parse("import solution as s\ndef t():\n    from solution import f, g as h\nimport math\n")
    imported, modules = without_solution_imports(tree)
    assert (imported, modules) == ({"f": "f", "h": "g"}, {"s"})
    assert ast.unparse(tree) == "def t():\n    pass\nimport math"
    assert sort("import solution\nassert solution.f(1)").solution == {"solution": None}


@pytest.mark.parametrize(
    ("entry_point", "name"),
    [(None, None), ("f", "f"), (" f ", "f"), ("Solution().f", "f"), ("Solution.f", "f")],
)
def test_an_entry_point_may_be_a_method(entry_point: str | None, name: str | None) -> None:
    assert entry_name(entry_point) == name


@pytest.mark.parametrize("entry_point", ["f(1)", "a.b", "", "Solution()"])
def test_an_entry_point_that_names_no_function_breaks_the_tests(entry_point: str) -> None:
    with pytest.raises(BrokenTests, match="is no name of a function"):
        entry_name(entry_point)


def test_functions_that_a_runner_would_call() -> None:
    tests = """if True:
        pass
def test_a(): assert f(1)
def test_b(x=1): assert f(x)
def helper(): pass
def test_called(): pass
test_called()
class TestThings: pass
class Cases(unittest.TestCase): pass
class Other: pass
"""
    assert names.test_functions(ast.parse(tests)) == (["test_a", "test_b"], ["TestThings", "Cases"])
    with pytest.raises(BrokenTests, match="test_c takes arguments, which nobody gives it"):
        names.test_functions(ast.parse("def test_c(fixture): pass"))


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("class Node:\n    def __init__(self):\n        self.x = 1", True),
        ("class Solution:\n    def f(self):\n        ...", False),
        ("def f(): pass", False),
        ("class", False),
    ],
)
def test_classes_that_do_something_live_where_they_run(prefix: str, expected: bool) -> None:
    assert has_classes(prefix) is expected
