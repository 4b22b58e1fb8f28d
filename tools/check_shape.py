"""Fails where a file or function is too long to be read at one sitting, and where a test does not stand by its file.

`tests/unit/` mirrors the package: `tests/unit/ROOM/test_NAME.py` tests `megatron_prime/ROOM/NAME.py`, or the package of
that name. Every file of the package from a certain length on has its test there.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
MIN_TESTED_LINES = 150
"""A file of the package of so many lines has a test of its name."""
PACKAGE, UNIT_TESTS = Path("megatron_prime"), Path("tests/unit")
FOLDERS = (PACKAGE, Path("tools"), Path("tests"))


def long_parts(path: Path) -> list[str]:
    """One line for the file and for each function of it that is over its budget."""
    source = path.read_text(encoding="utf-8")
    num_lines = len(source.splitlines())
    findings = [f"{path}: {num_lines} lines; {MAX_FILE_LINES} at the most"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                findings.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines; {MAX_FUNCTION_LINES} at the most"
                )
    return findings


def strays(root: Path) -> list[str]:
    """One line for each unit test whose name is that of no file and no package of its room.

    Args:
        root: of the repository.
    """
    findings = []
    for test in sorted((root / UNIT_TESTS).rglob("test_*.py")):
        room = test.parent.relative_to(root / UNIT_TESTS)
        tested = root / PACKAGE / room / test.name.removeprefix("test_")
        if not tested.is_file() and not (tested.with_suffix("") / "__init__.py").is_file():
            findings.append(
                f"{test.relative_to(root)}: there is no {tested.relative_to(root)}; name it by what it tests"
            )
    return findings


def untested(root: Path) -> list[str]:
    """One line for each long file of the package without a unit test of its name.

    Args:
        root: of the repository.
    """
    findings = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        place = path.relative_to(root / PACKAGE)
        named = place.parent if place.name == "__init__.py" else place.with_suffix("")
        test = UNIT_TESTS / named.parent / f"test_{named.name}.py"
        if num_lines >= MIN_TESTED_LINES and not (root / test).is_file():
            findings.append(f"{PACKAGE / place}: {num_lines} lines and no {test}")
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a repository; the exit status says whether nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(), help="of the repository (default: here)")
    root = parser.parse_args(arguments).root
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    findings = [line for path in paths for line in long_parts(path)] + strays(root) + untested(root)
    print("\n".join(findings) if findings else f"{len(paths)} files are short enough, and tests stand by their files")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
