"""Grades a file of answers: JSONL in, the same rows with their verdicts out, in order."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import DataError
from megatron_prime.interfaces import Verifier
from megatron_prime.verify.futures import known
from megatron_prime.verify.routing import build_verifier

MALFORMED_ROW = "malformed_row"
"""Status of a row that is no answer to grade; its `error` says why."""
ADDED = ("status", "reward", "seconds", "error")
"""Columns of the output beside those of the input."""
ABILITIES = ("math", "code")
_MAX_PENDING = 2048


class _RowError(ValueError):
    """Says what a row lacks."""


@dataclass(slots=True)
class FileSummary:
    """Of all rows of the output."""

    statuses: Counter[str] = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)
    """Of the rows that have one."""
    seconds: list[float] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts one row."""
        self.statuses[row["status"]] += 1
        self.seconds.append(row["seconds"])
        if row["reward"] is not None:
            self.rewards.append(row["reward"])

    def lines(self) -> list[str]:
        """For people."""
        total = self.statuses.total()
        lines = [f"{status:14}{count:8}{count / total:8.1%}" for status, count in self.statuses.most_common()]
        if self.rewards:
            lines.append(f"mean reward {sum(self.rewards) / len(self.rewards):.4f} of {len(self.rewards)} rows")
        if ordered := sorted(self.seconds):
            p50, p99 = (ordered[min(total - 1, int(share * total))] for share in (0.5, 0.99))
            lines.append(f"seconds per verdict: p50 {p50:.4f}, p99 {p99:.4f}, longest {ordered[-1]:.4f}")
        return lines


def verify_file(
    source: Path, target: Path, section: VerifierSection, progress: Callable[[int, int], None]
) -> FileSummary:
    """Grades every row of a file; where the target holds the first ones already, goes on after them.

    Args:
        source: JSONL with ``response``, ``ground_truth`` (or ``reward_model``), ``ability`` (``math`` or ``code``) and
            optionally ``problem`` (or ``question``, ``prompt``), ``data_source`` and ``extra_info``.
        target: gets the rows with ``status``, ``reward`` (null: missing), ``seconds`` and, where malformed or without a
            verdict because of its truth or tests, ``error``.
        section: how to grade.
        progress: called with the rows done and the rows there are.

    Raises:
        DataError: no such file, or the target holds something else.
        VerifierError: the verifier cannot work at all.
    """
    num_rows, abilities = _scan(source, section)
    summary = FileSummary()
    _require_file(target)
    num_done = _take_up(source, target, summary)
    progress(num_done, num_rows)
    pending: deque[tuple[dict[str, Any], Future[Verdict]]] = deque()
    with build_verifier(section, abilities) as verifier, target.open("a", encoding="utf-8") as file:

        def write() -> None:
            row, future = pending.popleft()
            verdict = future.result()
            row |= {"status": verdict.status, "reward": verdict.reward, "seconds": round(verdict.seconds, 6)}
            if verdict.reason and "error" not in row:
                row["error"] = verdict.reason
            file.write(json.dumps(row) + "\n")
            summary.add(row)
            progress(summary.statuses.total(), num_rows)

        for number, line in enumerate(_lines(source)):
            if number < num_done:
                continue
            pending.append(_submit(verifier, line, number, section))
            while pending and (pending[0][1].done() or len(pending) >= _MAX_PENDING):
                write()
        while pending:
            write()
    return summary


def _lines(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        yield from (line for line in file if line.strip())


def _scan(source: Path, section: VerifierSection) -> tuple[int, set[str]]:
    """The number of rows and the abilities that they need."""
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    num_rows, abilities = 0, set[str]()
    for line in _lines(source):
        num_rows += 1
        try:
            abilities.add(_read(line, section)[1].ability)
        except _RowError:
            continue
    return num_rows, abilities


def _submit(
    verifier: Verifier, line: bytes, number: int, section: VerifierSection
) -> tuple[dict[str, Any], Future[Verdict]]:
    try:
        row, prompt, response = _read(line, section, number)
    except _RowError as error:
        return _kept(line) | {"error": str(error)}, known(Verdict(status=MALFORMED_ROW, reward=None))
    return row, verifier.submit(prompt, response)


def _read(line: bytes, section: VerifierSection, number: int = 0) -> tuple[dict[str, Any], Prompt, Response]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _RowError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _RowError(f"expected an object with columns, found {type(row).__name__}")
    if not isinstance(row.get("response"), str):
        raise _RowError("response: must be text")
    ability = row.get("ability")
    if not isinstance(ability, str) or (ability not in ABILITIES and section.factory is None):
        raise _RowError(f"ability: must be one of {', '.join(ABILITIES)}, found {ability!r}")
    extra_info = row.get("extra_info")
    prompt = Prompt(
        prompt_id=f"row {number}",
        text=_question(row),
        token_ids=(),
        ground_truth=_ground_truth(row),
        ability=ability,
        data_source=str(row.get("data_source") or ""),
        extra_info=extra_info if isinstance(extra_info, dict) else {},
    )
    response = Response(text=row["response"], token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
    return row, prompt, response


def _ground_truth(row: Mapping[str, Any]) -> str:
    reward_model = row.get("reward_model")
    truth = row.get("ground_truth")
    if truth is None and isinstance(reward_model, Mapping):
        truth = reward_model.get("ground_truth")
    if isinstance(truth, dict):
        return json.dumps(truth)
    if isinstance(truth, str | int | float) and not isinstance(truth, bool):
        return str(truth)
    raise _RowError("ground_truth: must be text, a number, or an object with tests")


def _question(row: Mapping[str, Any]) -> str:
    """The question, where the row has it: an answer that only repeats a formula of it is none."""
    asked = next((row[key] for key in ("problem", "question", "prompt") if row.get(key)), "")
    if isinstance(asked, list):
        asked = "\n".join(str(m.get("content") or "") for m in asked if isinstance(m, Mapping))
    return asked if isinstance(asked, str) else ""


def _kept(line: bytes) -> dict[str, Any]:
    """The columns of a row, or a damaged row as it stands."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {"row": line.decode(errors="replace").strip()}


def _require_file(target: Path) -> None:
    """Makes the file if there is none, so that nothing is graded that could not be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.open("a+b").close()
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); name another file for the output") from error
    if not target.is_file():
        raise DataError(f"{target}: is no regular file; name another for the output")


def _take_up(source: Path, target: Path, summary: FileSummary) -> int:
    """How many rows the target holds; one that was cut off by the end of its process is removed."""
    if target.samefile(source):
        raise DataError(f"{target}: is the input; name another file for the output")
    whole, inputs = 0, _lines(source)
    with target.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                row, before = json.loads(line), next(inputs, None)
                same = before is not None and _without_added(row) == _without_added(_kept(before))
                summary.add(row)
            except (ValueError, KeyError, TypeError, AttributeError):
                same = False
            if not same:
                raise DataError(
                    f"{target}, row {number}: is not the verdict on row {number} of {source}; delete the file or name"
                    " another"
                )
            whole += len(line)
    os.truncate(target, whole)
    return summary.statuses.total()


def _without_added(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ADDED}
