"""Lists the benchmarks of `megatron-prime evaluate`, with each one's protocol (PRIME's)."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prime.data.readers import read_rows
from megatron_prime.data.row_formats import Question, Row
from megatron_prime.errors import DataError
from megatron_prime.evaluation import rows
from megatron_prime.evaluation.livecodebench import read_livecodebench

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published test set and how it is asked."""

    name: str
    title: str
    num_problems: int | None
    """As published; None where releases differ."""
    read: Callable[[Row, str], Question | None]
    """None: the row is of another test set in the same file."""
    files: tuple[str, ...]
    """Patterns below the data folder; all files of the first that matches any are read."""
    max_response_tokens: int = 4096
    num_responses: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


_TABLE = (
    Benchmark(
        "aime24", "AIME 2024", 30, rows.read_aime24, ("aime24/aimo-validation-aime.jsonl", "aime24/aime24_test.jsonl")
    ),
    Benchmark("amc23", "AMC 2023", 40, rows.read_math, ("amc/amc23_test.jsonl",)),
    Benchmark("amc", "AMC 2022-23 (PRIME's)", 83, rows.read_math, ("amc/aimo-validation-amc.jsonl",)),
    Benchmark(
        "math500",
        "MATH-500",
        500,
        rows.read_math,
        ("math500/math_test_cleaned.json", "math500/math500_test.jsonl"),
        max_response_tokens=8192,
    ),
    Benchmark(
        "minerva_math",
        "Minerva Math",
        272,
        rows.read_math,
        ("minerva_math/minerva_test.jsonl", "minerva_math/test.jsonl"),
    ),
    Benchmark(
        "olympiadbench",
        "OlympiadBench",
        675,
        rows.read_olympiadbench,
        ("olympiadbench/olympiadbench_test.jsonl", "olympiadbench/test.jsonl"),
    ),
    Benchmark("gsm8k", "GSM8K", 1319, rows.read_math, ("gsm8k/test.jsonl",)),
    Benchmark(
        "humaneval",
        "HumanEval",
        164,
        rows.read_humaneval,
        ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"),
    ),
    Benchmark("mbpp", "MBPP (sanitized, PRIME's)", 399, rows.read_mbpp, ("mbpp/new_mbpp.json",)),
    Benchmark(
        "leetcode",
        "LeetCode (PRIME's 180)",
        180,
        rows.read_leetcode,
        ("leetcode/leetcode-test.json",),
        max_response_tokens=8192,
    ),
    Benchmark(
        "livecodebench",
        "LiveCodeBench v2",
        None,
        read_livecodebench,
        ("livecodebench/test*.jsonl",),
        num_responses=10,
        temperature=0.2,
        top_p=0.95,
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}
"""In the order of tables."""


def available(folder: Path) -> list[str]:
    """Names of the benchmarks whose files lie in a folder."""
    return [name for name, benchmark in BENCHMARKS.items() if _files(folder, benchmark)]


def load_benchmarks(folder: str | Path, names: Sequence[str]) -> dict[str, list[tuple[str, Question]]]:
    """Reads benchmarks from a local folder.

    Args:
        folder: data folder with one folder per benchmark (docs/reference/evaluation.md has the layout).
        names: keys of `BENCHMARKS`.

    Returns:
        By name, in the order asked for: (stable id, question) of each problem.

    Raises:
        DataError: a problem with the folder, a name, a file or a row; lists all problems and what exists.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the folder that holds the benchmarks' folders")
    problems: list[str] = []
    found: dict[str, list[tuple[str, Question]]] = {}
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS:
            close = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"{name}: unknown benchmark{hint} (known: {', '.join(BENCHMARKS)})")
            continue
        try:
            found[name] = _load(root, BENCHMARKS[name])
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join([*problems, f"{root} has: {', '.join(available(root)) or 'no benchmark'}"]))
    return found


def _files(folder: Path, benchmark: Benchmark) -> list[Path]:
    return next((files for pattern in benchmark.files if (files := sorted(folder.glob(pattern)))), [])


def _load(folder: Path, benchmark: Benchmark) -> list[tuple[str, Question]]:
    files = _files(folder, benchmark)
    if not files:
        raise DataError(f"{benchmark.name}: {folder} has no {' and no '.join(benchmark.files)}")
    questions = [benchmark.read(row, where) for path in files for where, row in read_rows(str(path))]
    problems = [(f"{benchmark.name}/{n}", q) for n, q in enumerate(q for q in questions if q is not None)]
    if not problems:
        raise DataError(f"{benchmark.name}: no problem in {', '.join(map(str, files))}")
    if benchmark.num_problems not in (None, len(problems)):
        _log.warning("%s: %d problems, published are %d", benchmark.name, len(problems), benchmark.num_problems)
    return problems
