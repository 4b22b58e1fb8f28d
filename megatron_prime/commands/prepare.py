"""`megatron-prime prepare IN OUT`: training rows out of raw data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prime.batch import Prompt, Response
from megatron_prime.config.schema import VerifierSection
from megatron_prime.data.prepare.candidates import Candidate
from megatron_prime.data.prepare.contamination import Contamination
from megatron_prime.data.prepare.output import check_output, write_rows
from megatron_prime.data.prepare.pipeline import Cleaner, CleaningOptions
from megatron_prime.data.readers import read_rows
from megatron_prime.errors import DataError
from megatron_prime.evaluation.registry import available, load_benchmarks
from megatron_prime.observe.files import require_folder, write_atomically
from megatron_prime.verify.code.bad_tests import find_bad_tests, what_is_wrong
from megatron_prime.verify.routing import RoutingVerifier, build_verifier


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """What the command line says."""

    sources: tuple[str, ...]
    """Files or `hf:NAME[:CONFIG]:SPLIT`, as in `data.train`."""
    output: str
    """New `.jsonl` or `.parquet` file; the report lies beside it."""
    benchmarks: str | None = None
    """Folder of benchmarks whose problems are left out."""
    split: str = "train"
    num_workers: int = 1
    """Processes that run reference programs."""
    cleaning: CleaningOptions


def prepare(options: PrepareOptions) -> Mapping[str, Any]:
    """Cleans data sets and writes what is left in the schema of Eurus-2-RL-Data.

    Returns:
        The report, which is also in ``OUT.report.json``: counts and examples by reason.

    Raises:
        DataError: a source, a row, the benchmarks or the output is at fault. Then there is no output.
        VerifierError: this machine has no safe way to run reference programs.
    """
    output = Path(options.output)
    check_output(output)
    require_folder(output.parent)
    contamination = _contamination(options.benchmarks) if options.benchmarks is not None else None
    with ExitStack() as stack:
        programs = _Programs(stack, options.num_workers)
        runs = options.cleaning.references != "ignore"
        cleaner = Cleaner(
            options.cleaning, contamination, programs.statuses, programs.bad_tests if runs else _unreadable_tests
        )
        rows = (row for source in options.sources for row in read_rows(source))
        write_rows(output, cleaner.clean(rows), options.split)
    report = {
        "output": str(output),
        "sources": list(options.sources),
        "num_benchmark_problems": len(contamination) if contamination else 0,
        "options": asdict(options.cleaning),
        **cleaner.report.as_dict(),
    }
    write_atomically(output.with_name(f"{output.name}.report.json"), json.dumps(report, indent=1) + "\n")
    return report


def _contamination(folder: str) -> Contamination:
    names = available(Path(folder))
    if not names:
        raise DataError(f"{folder}: holds no benchmark; see docs/reference/evaluation.md for the files")
    return Contamination(
        (problem_id, question.extra_info.get("statement") or question.messages[-1]["content"])
        for problems in load_benchmarks(folder, names).values()
        for problem_id, question in problems
    )


class _Programs:
    """Runs programs by the verifier of training, which is set up when the first problem with programs comes."""

    def __init__(self, stack: ExitStack, num_workers: int) -> None:
        self._stack = stack
        self._section = VerifierSection(num_workers=num_workers)
        self._made: RoutingVerifier | None = None

    @property
    def _verifier(self) -> RoutingVerifier:
        if self._made is None:
            self._made = self._stack.enter_context(build_verifier(self._section, ["code"]))
        return self._made

    def statuses(self, programs: Sequence[tuple[Candidate, str]]) -> list[str]:
        """What came of each program."""
        verdicts = self._verifier.verify([(_prompt(candidate), _response(program)) for candidate, program in programs])
        return [verdict.status for verdict in verdicts]

    def bad_tests(self, candidates: Sequence[Candidate]) -> Mapping[str, str]:
        """What is wrong with their tests; references are nothing to go by where every program passes."""
        return find_bad_tests(self._verifier, {candidate.where: candidate.ground_truth for candidate in candidates})


def _unreadable_tests(candidates: Sequence[Candidate]) -> Mapping[str, str]:
    """What can be said of their tests without running anything."""
    found = ((candidate.where, what_is_wrong(candidate.ground_truth)) for candidate in candidates)
    return {where: reason for where, reason in found if reason is not None}


def _prompt(candidate: Candidate) -> Prompt:
    truth = candidate.ground_truth
    return Prompt(prompt_id=candidate.where, text="", token_ids=(), ground_truth=truth, ability="code")


def _response(program: str) -> Response:
    return Response(
        text=f"```python\n{program}\n```", token_ids=(), logprobs=(), finish_reason="stop", weight_version=0
    )
