"""PRIME's cleaning steps that need no model, row after row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from megatron_prime.data.prepare.candidates import Candidate, read_candidate
from megatron_prime.data.prepare.contamination import Contamination
from megatron_prime.data.prepare.rules import OpenQuestion, open_choices, reason_to_drop
from megatron_prime.data.prepare.similarity import NearDuplicates, fingerprint
from megatron_prime.data.row_formats import Row

REASONS = (
    "no_answer",
    "figure",
    "proof",
    "fill_in_blank",
    "choice",
    "choice_needed",
    "choice_unclear",
    "duplicate",
    "near_duplicate",
    "contaminated",
    "bad_tests",
    "no_reference",
    "reference_failed",
)
"""Why rows are dropped, in the order in which it is looked for."""
_NUM_EXAMPLES = 10
_CHUNK_ROWS = 256
_MAX_REFERENCES = 3

FindBadTests = Callable[[Sequence[Candidate]], Mapping[str, str]]
"""What is wrong with the tests of problems with programs, by where they stand; wrong programs pass some."""
RunReference = Callable[[Sequence[tuple[Candidate, str]]], list[str]]
"""Runs programs against the tests of their problems; ``pass``, or another status, for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleaningOptions:
    """Strictness of the cleaning."""

    multiple_choice: Literal["open", "drop"] = "open"
    """`open`: ask without the choices where a rule can; `drop`: leave all of them out."""
    similarity: float = 0.8
    """Share of common three-word runs from which two problems are near-duplicates; above 1 none are."""
    references: Literal["run", "require", "ignore"] = "run"
    """Code: `run` those there are, `require` that there is one, or `ignore` them."""


@dataclass(kw_only=True, slots=True)
class CleaningReport:
    """Counts of rows by fate."""

    num_rows: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By reason, where the first rows stand, with what they were taken for."""
    num_choices_opened: int = 0
    """Multiple-choice questions that became open ones (what comes later may still drop them)."""
    num_references_passed: int = 0
    by_source: dict[str, list[int]] = field(default_factory=dict)
    """Data source -> rows, and rows kept."""

    def drop(self, candidate: Candidate, reason: str, detail: str = "") -> None:
        """Counts a row that is left out."""
        self.dropped[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < _NUM_EXAMPLES:
            kept.append(f"{candidate.where}: {detail}" if detail else candidate.where)

    def as_dict(self) -> dict[str, Any]:
        """Returns the contents of the JSON report."""
        return {
            "num_rows": self.num_rows,
            "num_kept": self.num_kept,
            "num_choices_opened": self.num_choices_opened,
            "num_references_passed": self.num_references_passed,
            "dropped": {reason: self.dropped[reason] for reason in REASONS if self.dropped[reason]},
            "examples": {reason: self.examples[reason] for reason in REASONS if reason in self.examples},
            "by_source": {name: {"rows": n, "kept": kept} for name, (n, kept) in sorted(self.by_source.items())},
        }


class Cleaner:
    """Cleans rows in their order; of earlier ones it keeps no text (`similarity.NearDuplicates` says what).

    Args:
        options: how strictly.
        contamination: benchmark problems to leave out.
        run_reference: needed unless references are ignored.
        find_bad_tests: looks at the tests of problems with programs; they are kept unseen without it.
    """

    def __init__(
        self,
        options: CleaningOptions,
        contamination: Contamination | None = None,
        run_reference: RunReference | None = None,
        find_bad_tests: FindBadTests | None = None,
    ) -> None:
        self.report = CleaningReport()
        self._options = options
        self._contamination = contamination
        self._run_reference = run_reference
        self._find_bad_tests = find_bad_tests
        self._seen: dict[int, str] = {}
        self._similar = NearDuplicates(options.similarity)
        self._places: list[str] = []

    def clean(self, rows: Iterable[tuple[str, Row]]) -> Iterator[Candidate]:
        """Yields what is kept, of equal or similar rows the first.

        Args:
            rows: (where it stands, row), as `data.readers.read_rows` yields them.

        Raises:
            DataError: a row of an unknown layout.
        """
        candidates = (kept for kept in (self._check(read_candidate(row, where)) for where, row in rows) if kept)
        while chunk := list(islice(candidates, _CHUNK_ROWS)):
            for candidate in self._with_working_references(chunk):
                self.report.num_kept += 1
                self.report.by_source[candidate.data_source][1] += 1
                yield candidate

    def _check(self, candidate: Candidate) -> Candidate | None:
        report = self.report
        report.num_rows += 1
        report.by_source.setdefault(candidate.data_source, [0, 0])[0] += 1
        if not candidate.ground_truth or not candidate.problem:
            return report.drop(candidate, "no_answer", candidate.label and f"'{candidate.label}'")
        if candidate.ability == "math":
            opened = self._check_math(candidate)
            if isinstance(opened, str):
                return report.drop(candidate, opened)
            candidate = opened
        mark = fingerprint(candidate.problem)
        if mark in self._seen:
            return report.drop(candidate, "duplicate", self._seen[mark])
        self._seen[mark] = candidate.where
        # A changed number makes a new problem of the same words, mostly with another answer.
        key = candidate.ground_truth if candidate.ability == "math" else candidate.ability
        similar = self._similar.add(candidate.problem, key)
        if similar is not None:
            return report.drop(candidate, "near_duplicate", self._places[similar])
        self._places.append(candidate.where)
        known = self._contamination.find(candidate.problem) if self._contamination else None
        if known is not None:
            return report.drop(candidate, "contaminated", known)
        return candidate

    def _check_math(self, candidate: Candidate) -> Candidate | str:
        """The candidate, without choices where it had some, or why it is dropped."""
        reason = reason_to_drop(candidate.problem)
        if reason is not None:
            return reason
        opened = open_choices(candidate.problem, candidate.ground_truth)
        if opened is None:
            return candidate
        if self._options.multiple_choice == "drop":
            return "choice"
        if isinstance(opened, OpenQuestion):
            self.report.num_choices_opened += 1
            return replace(candidate, problem=opened.text, ground_truth=opened.answer)
        return opened

    def _with_working_references(self, chunk: list[Candidate]) -> Iterator[Candidate]:
        """Leaves out programs' problems with bad tests, and those of which no reference passes the tests."""
        mode = self._options.references
        programs = [candidate for candidate in chunk if candidate.ability == "code"]
        bad = self._find_bad_tests(programs) if self._find_bad_tests and programs else {}
        statuses = {} if mode == "ignore" else self._run_references([c for c in chunk if c.where not in bad])
        for candidate in chunk:
            status = statuses.get(candidate.where)
            if candidate.where in bad:
                self.report.drop(candidate, "bad_tests", bad[candidate.where])
            elif candidate.ability != "code" or mode == "ignore":
                yield candidate
            elif status is None and mode == "require":
                self.report.drop(candidate, "no_reference")
            elif status not in (None, "pass"):
                self.report.drop(candidate, "reference_failed", status)
            else:
                self.report.num_references_passed += status == "pass"
                yield candidate

    def _run_references(self, chunk: list[Candidate]) -> dict[str, str]:
        """Runs each row's references one by one until one passes; rows without references are left out."""
        statuses: dict[str, str] = {}
        for number in range(_MAX_REFERENCES):
            todo = [
                (candidate, candidate.references[number])
                for candidate in chunk
                if number < len(candidate.references) and statuses.get(candidate.where) != "pass"
            ]
            if todo and self._run_reference is not None:
                results = self._run_reference(todo)
                statuses |= {candidate.where: status for (candidate, _), status in zip(todo, results, strict=True)}
        return statuses
