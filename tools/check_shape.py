"""Fails where a file or a function is too long to be read at one sitting, or a unit test mirrors no module."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70


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


def not_mirrored(package: Path, tests: Path) -> list[str]:
    """One line for each unit test file that no module of the package has the place and name of."""
    return [
        f"{path}: there is no {package / path.relative_to(tests).with_name(path.name.removeprefix('test_'))}"
        for path in sorted(tests.rglob("test_*.py"))
        if not (package / path.relative_to(tests).with_name(path.name.removeprefix("test_"))).exists()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all Python files below the given folders; the exit status says whether all are short enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("megatron_prime"), Path("tools"), Path("tests")])
    options = parser.parse_args(arguments)
    paths = sorted(path for folder in options.folders for path in folder.rglob("*.py"))
    findings = [line for path in paths for line in long_parts(path)]
    findings += not_mirrored(Path("megatron_prime"), Path("tests/unit"))
    print("\n".join(findings) if findings else f"{len(paths)} files are short enough")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
