"""`megatron-prime prepare IN OUT`: training rows out of raw data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
        cleaner = Cleaner(options.cleaning, contamination, _reference_runner(stack, options.num_workers))
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


def _reference_runner(stack: ExitStack, num_workers: int) -> Callable[[Sequence[tuple[Candidate, str]]], list[str]]:
    """Runs programs by the verifier of training, which is set up when the first program comes."""
    verifiers: list[RoutingVerifier] = []

    def run(programs: Sequence[tuple[Candidate, str]]) -> list[str]:
        if not verifiers:
            section = VerifierSection(num_workers=num_workers)
            verifiers.append(stack.enter_context(build_verifier(section, ["code"])))
        verdicts = verifiers[0].verify([(_prompt(candidate), _response(program)) for candidate, program in programs])
        return [verdict.status for verdict in verdicts]

    return run


def _prompt(candidate: Candidate) -> Prompt:
    truth = candidate.ground_truth
    return Prompt(prompt_id=candidate.where, text="", token_ids=(), ground_truth=truth, ability="code")


def _response(program: str) -> Response:
    return Response(
        text=f"```python\n{program}\n```", token_ids=(), logprobs=(), finish_reason="stop", weight_version=0
    )
