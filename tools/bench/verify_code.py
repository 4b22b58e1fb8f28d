"""Measures the code verifier: short programs per second, verdicts that are known, and programs that attack.

Short programs run on two workers through the whole verifier, once in the fork server and once in bubblewrap, beside a
plain `subprocess` for each program. Verdicts: reference solutions of HumanEval and MBPP, EvalPlus's statuses of
Qwen2.5-Coder's programs, CodeRL's of APPS programs, scores of PRIME's grader, tricks that must score nothing and
legitimate forms that must score everything. Attacks: what they reached, and whether a process or file is left.

--data is a folder with `code_cases/*.jsonl` and optionally `humaneval/HumanEval.jsonl.gz` and `mbpp/new_mbpp.json`;
without it the small copies in tests/data are used. Prints tables and writes build/bench/verify_code.json.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.measuring import ROOT, Row, bench_parser, machine, write_result

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import CodeVerifierSection, VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.routing import RoutingVerifier, build_verifier

SAMPLE = ROOT / "tests" / "data"
NUM_WORKERS, NUM_PROGRAMS, NUM_REPEATS = 2, 200, 3
NUM_TINY = 2
"""Programs of each kind in a tiny run."""
SHORT = """import sys, math, collections, heapq, itertools, functools, bisect
# program {number}
print(sum(map(int, sys.stdin.read().split())))
"""
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/", "/home")
Item = tuple[Prompt, Response]


def item(ground_truth: Row, code: str, number: int = 0) -> Item:
    """A program as a model's answer to a problem."""
    prompt = Prompt(prompt_id=str(number), text="", token_ids=(), ground_truth=json.dumps(ground_truth), ability="code")
    text = f"```python\n{code}\n```"
    return prompt, Response(text=text, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)


def make_verifier(isolation: str, mode: str = "all_or_nothing", **limits: float) -> RoutingVerifier:
    code = CodeVerifierSection(isolation=isolation, mode=mode, **limits)  # type: ignore[arg-type]
    return build_verifier(VerifierSection(num_workers=NUM_WORKERS, cache_size=0, code=code), ["code"])


def timed(verifier: RoutingVerifier, items: Sequence[Item]) -> tuple[list[Verdict], float]:
    begun = time.perf_counter()
    verdicts = verifier.verify(items)
    return verdicts, time.perf_counter() - begun


# Speed


def bench_speed(isolations: Sequence[str], num_programs: int, num_repeats: int) -> list[Row]:
    """Programs per second of every way to run them, interleaved; the best of several rounds."""
    programs = [(SHORT.format(number=number), f"{number} 1\n", number + 1) for number in range(num_programs)]
    items = [item({"inputs": [text], "outputs": [str(total)]}, code) for code, text, total in programs]
    verifiers = {isolation: make_verifier(isolation) for isolation in isolations}
    best: dict[str, float] = {}
    for verifier in verifiers.values():
        # Workers start with the first programs.
        verifier.verify(items[: 2 * NUM_WORKERS])
    for _ in range(num_repeats):
        for name, verifier in verifiers.items():
            verdicts, seconds = timed(verifier, items)
            assert all(verdict.status == "pass" for verdict in verdicts), Counter(v.status for v in verdicts)
            best[name] = min(seconds, best.get(name, seconds))
        best["plain subprocess"] = min(run_plainly(programs), best.get("plain subprocess", float("inf")))
    for verifier in verifiers.values():
        verifier.close()
    rows = [
        {"variant": "ours" if name in verifiers else name, "isolation": name if name in verifiers else None}
        | {"programs": num_programs, "seconds": seconds, "per_second": num_programs / seconds}
        for name, seconds in best.items()
    ]
    for row in rows:
        name = " in ".join(filter(None, (row["variant"], row["isolation"])))
        print(f"{name:34}{row['programs']:5} programs {row['seconds']:7.2f} s {row['per_second']:7.0f}/s")
    return rows


def run_plainly(programs: Sequence[tuple[str, str, int]]) -> float:
    def run(program: tuple[str, str, int]) -> None:
        code, text, total = program
        command = [sys.executable, "-I", "-c", code]
        output = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=10).stdout
        assert int(output) == total

    begun = time.perf_counter()
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        list(threads.map(run, programs))
    return time.perf_counter() - begun


# Known verdicts


def known_sets(data: Path) -> dict[str, tuple[str, list[tuple[Item, float]]]]:
    """Programs with the reward that they must get, and the mode of scoring."""
    cases = data / "code_cases"
    sets: dict[str, tuple[str, list[tuple[Item, float]]]] = {}

    def add(name: str, mode: str, pairs: Iterable[tuple[Item, float]]) -> None:
        if found := list(pairs):
            sets[name] = (mode, found)

    add("HumanEval reference solutions", "all_or_nothing", map(humaneval_case, humaneval_rows(data)))
    add("MBPP reference solutions", "all_or_nothing", map(mbpp_case, mbpp_rows(data)))
    evalplus = [*read_rows(cases / "evalplus.jsonl"), *read_rows(cases / "humaneval_qwen25coder.jsonl")]
    prompts = {row["entry_point"]: row["prompt"] for row in humaneval_rows(data)}
    add("EvalPlus statuses", "all_or_nothing", (evalplus_case(row, prompts) for row in evalplus))
    # Programs to be called are recorded there as APPS's grader had wrapped them, not as they were written.
    apps = [row for row in read_rows(cases / "apps_coderl.jsonl") if row["fn_name"] is None]
    add("CodeRL labels of APPS programs", "all_or_nothing", map(pairs_case, apps))
    add("scores of PRIME's grader", "prime_fraction", map(pairs_case, read_rows(cases / "verl_prime_code.jsonl")))
    for kind, name in (("hack", "reward hacks"), ("escape", "escapes"), ("legit", "legitimate forms")):
        chosen = [row for row in with_samples(data, "hacks_and_forms") if row["kind"] == kind]
        add(f"{name} by hand", "fraction_all", map(squares_case, chosen))
    return sets


def humaneval_rows(data: Path) -> list[Row]:
    packed = data / "humaneval" / "HumanEval.jsonl.gz"
    if packed.exists():
        return [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    return read_rows(data / "code_cases" / "humaneval.jsonl")


def mbpp_rows(data: Path) -> list[Row]:
    columns = data / "mbpp" / "new_mbpp.json"
    if not columns.exists():
        return read_rows(data / "code_cases" / "mbpp.jsonl")
    content = json.loads(columns.read_text())
    if isinstance(content, list):
        return content
    return [{name: column[key] for name, column in content.items()} for key in next(iter(content.values()))]


def humaneval_case(row: Row) -> tuple[Item, float]:
    tests = {"assert_code": row["test"], "entry_point": row["entry_point"], "prefix_code": row["prompt"]}
    return item(tests, row["prompt"] + row["canonical_solution"]), 1.0


def mbpp_case(row: Row) -> tuple[Item, float]:
    tests = {"assert_code": row["test_list"], "setup_code": "\n".join(row["test_imports"])}
    return item(tests, row["code"]), 1.0


def evalplus_case(row: Row, prompts: dict[str, str]) -> tuple[Item, float]:
    """With the problem's own code, which two of its tests use."""
    tests = {
        "assert_code": row["test"],
        "entry_point": row["entry_point"],
        "prefix_code": prompts.get(row["entry_point"], ""),
    }
    return item(tests, row["code"]), float(row["expected"])


def pairs_case(row: Row) -> tuple[Item, float]:
    tests = {"inputs": row["inputs"], "outputs": row["outputs"], "fn_name": row.get("fn_name")}
    return item(tests, row["code"]), float(row["expected_score"] if "expected_score" in row else row["expected"])


def squares_case(row: Row) -> tuple[Item, float]:
    """Cases without tests of their own compute n * n + 7."""
    if "inputs" in row:
        return pairs_case(row)
    numbers, name = range(1, 11), row["fn_name"]
    tests = {"fn_name": name, "inputs": [[n] for n in numbers], "outputs": [n * n + 7 for n in numbers]}
    if name is None:
        tests = {"inputs": [f"{n}\n" for n in numbers], "outputs": [f"{n * n + 7}\n" for n in numbers]}
    return item(tests, row["code"]), row["expected_score"]


def bench_verdicts(data: Path, isolation: str, at_most: int | None) -> list[Row]:
    rows: list[Row] = []
    for name, (mode, found) in known_sets(data).items():
        pairs = found[:at_most]
        with make_verifier(isolation, mode) as verifier:
            verdicts, seconds = timed(verifier, [case for case, _ in pairs])
        right = sum(verdict.reward == wanted for verdict, (_, wanted) in zip(verdicts, pairs, strict=True))
        statuses = dict(Counter(verdict.status for verdict in verdicts))
        rows.append(
            {"variant": "ours", "set": name, "cases": len(pairs), "as_expected": right}
            | {"seconds": seconds, "statuses": statuses}
        )
        print(f"{name:34}{right:5} of {len(pairs):4} {seconds:7.2f} s  {statuses}")
    return rows


# Attacks


def bench_attacks(data: Path, isolation: str, at_most: int | None) -> Row:
    """Runs every hostile program, then looks for what is left."""
    cases = with_samples(data, "hostile")[:at_most]
    contains = "def check(input, output, expected):\n    return expected in output"
    before = files_outside()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        make_verifier(isolation, test_seconds=1.0, total_seconds=5.0) as verifier,
    ):
        port = str(listener.getsockname()[1])
        items = [
            item(
                {"inputs": [""], "outputs": [row["must_not_print"] or "\0"], "checker": {"code": contains}},
                row["code"].replace("18999", port),
            )
            for row in cases
        ]
        verdicts, seconds = timed(verifier, items)
        survivors = len(descendants()) - NUM_WORKERS * {"fork_server": 3, "bubblewrap": 1}[isolation]
    row = {
        "variant": "ours",
        "set": "attacks",
        "isolation": isolation,
        "cases": len(cases),
        "escapes": sum(verdict.status == "pass" for verdict in verdicts),
        "survivors": survivors,
        "files_outside": len(files_outside() - before),
        "longest_seconds": max(verdict.seconds for verdict in verdicts),
        "seconds": seconds,
        "statuses": dict(Counter(verdict.status for verdict in verdicts)),
    }
    name = f"attacks in {isolation}"
    print(
        f"{name:34}{row['cases']:5} programs: {row['escapes']} escapes, {row['survivors']} survivors, "
        f"{row['files_outside']} files outside, longest {row['longest_seconds']:.1f} s, all {seconds:.1f} s"
    )
    return row


def bench_assertions(isolation: str, at_most: int | None) -> Row:
    """Programs that bring their own judge; each must get 0: a reward is stolen, and a missing one dodged."""
    cases = read_rows(SAMPLE / "code_cases" / "assertion_attacks.jsonl")[:at_most]
    with make_verifier(isolation, test_seconds=1.0, total_seconds=5.0) as verifier:
        verdicts, seconds = timed(verifier, [item(row["tests"], row["code"]) for row in cases])
    rewarded = [row["id"] for row, verdict in zip(cases, verdicts, strict=True) if verdict.reward]
    missing = [row["id"] for row, verdict in zip(cases, verdicts, strict=True) if verdict.reward is None]
    name = f"attacks on assertions ({isolation})"
    print(f"{name:34}{len(cases):5} programs: {len(rewarded)} rewarded {rewarded}, {len(missing)} missing {missing}")
    return {
        "variant": "ours",
        "set": "attacks on assertions",
        "isolation": isolation,
        "cases": len(cases),
        "attacks_rewarded": len(rewarded),
        "missing_caused_by_answers": len(missing),
        "seconds": seconds,
    }


def descendants() -> set[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def files_outside() -> set[str]:
    marks = ("left_behind", "pcescape", "big")
    names = (f"{place}/{name}" for place in PLACES if os.path.isdir(place) for name in os.listdir(place))
    return {path for path in names if path.rpartition("/")[2].startswith(marks)}


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def with_samples(data: Path, name: str) -> list[Row]:
    """Cases of the data folder and those of the repository that are not among them."""
    rows = read_rows(data / "code_cases" / f"{name}.jsonl")
    known = {row["id"] for row in rows}
    return [*rows, *(row for row in read_rows(SAMPLE / "code_cases" / f"{name}.jsonl") if row["id"] not in known)]


def available() -> list[str]:
    """The safe isolations of this machine."""
    found = []
    for isolation in ("fork_server", "bubblewrap"):
        try:
            make_verifier(isolation).close()
            found.append(isolation)
        except VerifierError as error:
            print(f"left out: {error}")
    return found


def main() -> None:
    """Runs all parts."""
    parser = bench_parser(__doc__)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder of cases")
    parser.add_argument("--only", choices=["speed", "verdicts", "attacks"], action="append")
    options = parser.parse_args()
    parts = options.only or ["speed", "verdicts", "attacks"]
    isolations = available()
    at_most = NUM_TINY if options.tiny else None
    sizes = (NUM_TINY, 1) if options.tiny else (NUM_PROGRAMS, NUM_REPEATS)
    rows: list[Row] = bench_speed(isolations, *sizes) if "speed" in parts else []
    if "verdicts" in parts and isolations:
        rows += bench_verdicts(options.data, isolations[0], at_most)
    if "attacks" in parts:
        rows += [bench_attacks(options.data, isolation, at_most) for isolation in isolations]
        rows += [bench_assertions(isolation, at_most) for isolation in isolations]
    write_result("verify_code", machine(), rows, options)


if __name__ == "__main__":
    main()
