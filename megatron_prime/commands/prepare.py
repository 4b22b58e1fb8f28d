"""`megatron-prime prepare`: training rows out of raw data sets."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prime.commands.arguments import Commands, above_zero, add_command, at_least_one
from megatron_prime.config.schema import VerifierSection
from megatron_prime.errors import DataError

if TYPE_CHECKING:
    from megatron_prime.batch import Prompt, Response
    from megatron_prime.data.prepare.candidates import Candidate
    from megatron_prime.data.prepare.contamination import Contamination
    from megatron_prime.verify.routing import RoutingVerifier


def add_parser(commands: Commands) -> None:
    text = "clean data sets for training: PRIME's steps that need no model"
    parser = add_command(commands, "prepare", text, run)
    text = ".jsonl, .jsonl.gz, .json, .parquet or hf:NAME[:CONFIG]:SPLIT"
    parser.add_argument("sources", nargs="+", metavar="in", help=text)
    text = "new .jsonl or .parquet file; the report lies beside it"
    parser.add_argument("output", metavar="out", type=Path, help=text)
    parser.add_argument("--benchmarks", metavar="FOLDER", type=Path, help="leave out what is in these benchmarks")
    text = "open: ask without the choices where a rule can; drop: leave such questions out (default: open)"
    parser.add_argument("--multiple-choice", choices=["open", "drop"], default="open", help=text)
    text = "share of common three-word runs that makes two problems the same; above 1: none (default: 0.8)"
    parser.add_argument("--similarity", type=above_zero, default=0.8, help=text)
    text = "reference programs: run those there are, require one, or ignore them (default: run)"
    parser.add_argument("--references", choices=["run", "require", "ignore"], default="run", help=text)
    parser.add_argument("--split", default="train", help="name in extra_info (default: train)")
    parser.add_argument("--num-workers", type=at_least_one, default=os.cpu_count() or 1, help="run programs at once")


def run(options: argparse.Namespace) -> int:
    """Writes what is left in the schema of Eurus-2-RL-Data, and a report: counts and examples by reason.

    Raises:
        DataError: a source, a row, the benchmarks or the output is at fault. Then there is no output.
        VerifierError: this machine has no safe way to run reference programs.
    """
    from megatron_prime.data.prepare.output import check_output, write_rows
    from megatron_prime.data.prepare.pipeline import Cleaner, CleaningOptions
    from megatron_prime.data.readers import read_rows
    from megatron_prime.observe.atomic_files import require_folder, write_atomically
    from megatron_prime.observe.report import cleaning_table

    output: Path = options.output
    check_output(output)
    require_folder(output.parent)
    contamination = _contamination(options.benchmarks) if options.benchmarks is not None else None
    cleaning = CleaningOptions(
        multiple_choice=options.multiple_choice, similarity=options.similarity, references=options.references
    )
    with ExitStack() as stack:
        programs = _Programs(stack, options.num_workers)
        bad_tests = _unreadable_tests if options.references == "ignore" else programs.bad_tests
        cleaner = Cleaner(cleaning, contamination, programs.statuses, bad_tests)
        rows = (row for source in options.sources for row in read_rows(source))
        write_rows(output, cleaner.clean(rows), options.split)
    report = {
        "output": str(output),
        "sources": options.sources,
        "num_benchmark_problems": len(contamination) if contamination else 0,
        "options": asdict(cleaning),
        **cleaner.report.as_dict(),
    }
    write_atomically(output.with_name(f"{output.name}.report.json"), json.dumps(report, indent=1) + "\n")
    print(cleaning_table(report), end="")
    return 0


def _contamination(folder: Path) -> Contamination:
    from megatron_prime.data.prepare.contamination import Contamination
    from megatron_prime.evaluation.registry import available, load_benchmarks

    names = available(folder)
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
        from megatron_prime.verify.routing import build_verifier

        if self._made is None:
            self._made = self._stack.enter_context(build_verifier(self._section, ["code"]))
        return self._made

    def statuses(self, programs: Sequence[tuple[Candidate, str]]) -> list[str]:
        """What came of each program."""
        verdicts = self._verifier.verify([(_prompt(candidate), _response(program)) for candidate, program in programs])
        return [verdict.status for verdict in verdicts]

    def bad_tests(self, candidates: Sequence[Candidate]) -> Mapping[str, str]:
        """What is wrong with their tests; references are nothing to go by where every program passes."""
        from megatron_prime.verify.code.bad_tests import find_bad_tests

        return find_bad_tests(self._verifier, {candidate.where: candidate.ground_truth for candidate in candidates})


def _unreadable_tests(candidates: Sequence[Candidate]) -> Mapping[str, str]:
    """What can be said of their tests without running anything."""
    from megatron_prime.verify.code.bad_tests import what_is_wrong

    found = ((candidate.where, what_is_wrong(candidate.ground_truth)) for candidate in candidates)
    return {where: reason for where, reason in found if reason is not None}


def _prompt(candidate: Candidate) -> Prompt:
    from megatron_prime.batch import Prompt

    truth = candidate.ground_truth
    return Prompt(prompt_id=candidate.where, text="", token_ids=(), ground_truth=truth, ability="code")


def _response(program: str) -> Response:
    from megatron_prime.batch import Response

    return Response(
        text=f"```python\n{program}\n```", token_ids=(), logprobs=(), finish_reason="stop", weight_version=0
    )
