"""Which names in the tests are the program's: read from their text, before anything runs.

A name that the tests, their set-up or the problem's own code define is never looked up in the program, nor is one that
only a forgotten import can mean. So no program can bring its own judge.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SOLUTION = "solution"
"""The module that tests in the manner of pytest import the program from."""
_ALIASES = {"np": "numpy", "pd": "pandas"}
_LIBRARIES = ("math", "cmath", "collections", "itertools", "functools", "heapq", "bisect", "operator", "copy", "re")
_LIBRARIES += ("string", "random", "statistics", "fractions", "decimal", "datetime", "typing", "json", "time", "io")
ENTRY_POINT = re.compile(r"(?:Solution(?:\(\))?\.)?([A-Za-z_]\w*)")


class BrokenTests(Exception):
    """Tests that no program can be judged by; says why."""


@dataclass(frozen=True, slots=True)
class Names:
    """Of the tests, by where they are looked up."""

    program: dict[str, str]
    """Name in the tests -> name in the program."""
    helpers: frozenset[str]
    """Defined by the problem's prefix, which stands before the program's own code."""
    objects: dict[str, Any]
    """Modules and library functions that the tests use without importing them."""
    undefined: frozenset[str]
    """Nobody defines them."""
    solution: dict[str, None]
    """Names of the program itself, as a module."""


def entry_name(entry_point: str | None) -> str | None:
    """The function that ``entry_point`` means: `f`, and also `f` for `Solution().f`.

    Raises:
        BrokenTests: it means none.
    """
    if entry_point is None:
        return None
    match = ENTRY_POINT.fullmatch(entry_point.strip())
    if match is None:
        raise BrokenTests(f"entry_point {entry_point!r} is no name of a function and no Solution().method")
    return match.group(1)


def without_solution_imports(tree: ast.Module) -> tuple[dict[str, str], set[str]]:
    """Takes `from solution import f as g` and `import solution` out of a test.

    Returns:
        Imported names (name in the tests -> name in the program), and names of the module.
    """
    imported: dict[str, str] = {}
    modules: set[str] = set()
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            kept = []
            for statement in block:
                if isinstance(statement, ast.ImportFrom) and statement.module == SOLUTION:
                    imported |= {a.asname or a.name: a.name for a in statement.names if a.name != "*"}
                elif isinstance(statement, ast.Import) and [a.name for a in statement.names] == [SOLUTION]:
                    modules.add(statement.names[0].asname or SOLUTION)
                else:
                    kept.append(statement)
            if len(kept) < len(block):
                setattr(node, field, kept or [ast.copy_location(ast.Pass(), block[0])])
    return imported, modules


def sort_names(trees: Sequence[ast.Module], prefix: str, entry: str | None) -> Names:
    """Says of every name that the tests use and do not define where it comes from.

    Args:
        trees: set-up and tests; imports of the program are taken out of them.
        prefix: code of the problem before the program's.
        entry: the function that the problem asks for, where it says so.
    """
    imported: dict[str, str] = {}
    modules: set[str] = set()
    for tree in trees:
        found, own = without_solution_imports(tree)
        imported |= found
        modules |= own
    used = _free(trees) - modules
    called = {
        n.func.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    builtin = {name for name in used if hasattr(builtins, name)}
    open_names = used - builtin - imported.keys() - ({entry} if entry else set())
    helpers = open_names & _helpers(prefix)
    open_names -= helpers
    objects = {n: m for n in open_names - called if (m := _module(_ALIASES.get(n, n))) is not None}
    open_names -= objects.keys()
    # A single name is the program's, whatever else is called so.
    alone = entry is None and len(open_names) == 1 and not (imported or modules)
    known = {} if alone else {name: found for name in open_names if (found := _library(name)) is not None}
    program = dict(imported)
    if entry is not None:
        program |= {entry: entry} if entry in used else {}
        return Names(
            program, frozenset(helpers), objects | known, frozenset(open_names - known.keys()), dict.fromkeys(modules)
        )
    if program or modules or open_names - known.keys():
        program |= {name: name for name in open_names - known.keys()}
        objects |= known
    elif known:
        # What the tests call can only be the program's, whatever else is called so.
        program = {name: name for name in known}
    elif not helpers:
        program = {name: name for name in _first_called(trees, builtin & called)}
    return Names(program, frozenset(helpers), objects, frozenset(), dict.fromkeys(modules))


def _first_called(trees: Sequence[ast.Module], names: set[str]) -> list[str]:
    """The built-in name that tests of nothing but built-in names are about: the first one that is called."""
    for tree in trees:
        for statement in tree.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                    return [node.func.id]
    return []


def _free(trees: Sequence[ast.Module]) -> set[str]:
    """Names that code reads and nowhere defines."""
    read: set[str] = set()
    bound: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            else:
                bound.update(_bound_by(node))
    return read - bound


def _bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name


def _helpers(prefix: str) -> set[str]:
    """What the prefix defines itself; a function of it without a body is the one to be written."""
    names: set[str] = set()
    try:
        body = ast.parse(prefix).body
    except (SyntaxError, ValueError):
        return names
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            if not _is_stub(statement):
                names.add(statement.name)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names |= {(a.asname or a.name).partition(".")[0] for a in statement.names}
        else:
            names |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def _is_stub(node: ast.stmt) -> bool:
    """Whether nothing is done: only a text, `pass`, `...` or an error; of a class, only such functions."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return all(map(_is_stub, node.body))
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.Pass, ast.Raise))


def _module(name: str) -> Any:
    if name not in sys.stdlib_module_names and name not in _ALIASES.values():
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _library(name: str) -> Any:
    """A function or class of the usual modules, which the tests forgot to import."""
    for module in _LIBRARIES:
        found = getattr(_module(module), name, None)
        if found is not None and not name.startswith("_"):
            return found
    return None


def has_classes(prefix: str) -> bool:
    """Whether code defines classes that do something, whose objects live where it runs."""
    try:
        return any(isinstance(node, ast.ClassDef) and not _is_stub(node) for node in ast.parse(prefix).body)
    except (SyntaxError, ValueError):
        return False


def test_functions(tree: ast.Module) -> tuple[list[str], list[str]]:
    """Functions and classes of a test that a runner of tests would call, by their names.

    Raises:
        BrokenTests: some take arguments, or nobody calls a function ``check``.
    """
    functions: list[str] = []
    classes: list[str] = []
    called = {
        n.func.id for s in tree.body for n in ast.walk(s) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    for statement in tree.body:
        if (
            isinstance(statement, ast.FunctionDef)
            and statement.name.startswith("test")
            and statement.name not in called
        ):
            arguments = statement.args
            if len(arguments.args) + len(arguments.posonlyargs) > len(arguments.defaults) or any(
                default is None for default in arguments.kw_defaults
            ):
                raise BrokenTests(f"{statement.name} takes arguments, which nobody gives it")
            functions.append(statement.name)
        elif isinstance(statement, ast.ClassDef) and statement.name not in called:
            bases = {ast.unparse(base).rpartition(".")[2] for base in statement.bases}
            if statement.name.startswith("Test") or "TestCase" in bases:
                classes.append(statement.name)
    return functions, classes
