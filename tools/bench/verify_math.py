"""Measures the math verifier beside math-verify: agreement with labelled cases, time, bombs and injected payloads.

The cases are the files grader_cases/*.jsonl of the folder --data, of rows {"pred", "gold", "expected", "form", ..}:
`bare` and `text` answers are put into a box, `boxed` and `output` are taken as they are; prose without a box is left
out, as the verifier wants a box. Without --data the small sample in tests/data is used. Prints a table and
writes build/bench/verify_math.json.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.measuring import ROOT, Row, bench_parser, machine, write_result

from megatron_prime.batch import Prompt, Response
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.verify.math.answer import extract_answer
from megatron_prime.verify.math.normalize import normalize
from megatron_prime.verify.routing import RoutingVerifier, build_verifier

SAMPLE = ROOT / "tests" / "data"
NUM_REAL, NUM_BOMBS = 1024, 20
NUM_TINY = 4
"""Cases of each set, and real outputs with one bomb among them, in a tiny run."""
REAL = ("model_outputs", "qwen", "gsm8k")
"""How the names of sets of real outputs begin or end."""
BOMBS = (
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "100000000!",
    r"\binom{1000000000}{500000000}",
    "(x+1)^{100000}",
    r"\prod_{n=1}^{1000000000} n",
    r"\int_0^1 x^{x^x} dx",
    r"\sin(10^{10000})",
)
"""Where the folder has none."""
HARD = (
    *(r"\gcd(10^{100000},3)", r"\gcd(48,36)", r"17 \mod 5", r"(1+i)^{10^9}", r"\sqrt[1000000000]{2}", "x!!!!!!!!"),
    *("(" * 400 + "1" + ")" * 400, r"\sqrt{" * 150 + "2" + "}" * 150, "1/" * 400 + "1", "x^" * 400 + "x", "|" * 501),
    *("1/0", r"\ln 0", r"\frac{", "2^2^2^2^2^2", r"z \in [0, 9^{9^{9^9}}]", r"\zeta(3)", "0.(3)", r"\pm" * 300 + "1"),
)
TRUTHS = (
    "3",
    "x+1",
    r"\sqrt{2}",
    "(1,5)",
    r"\{1,2\}",
    "x^2+y^2=1",
    r"(-\infty,3]\cup[5,\infty)",
    "2^{31}-1",
    "i",
    "n!",
)
TRUTHS += (
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"1\leq|z|\leq \frac{3}{2}",
    "12_7",
    r"3\pm\sqrt2",
    r"\text{Yes}",
    "x<3",
)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
Case = dict[str, Any]


def read_sets(folder: Path) -> dict[str, list[Case]]:
    """Rows by file; the hand-written ones by category too."""
    sets: dict[str, list[Case]] = {}
    for path in sorted((folder / "grader_cases").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            case = {"form": "boxed"} | json.loads(line)
            if case.get("disputed") or (case["form"] == "text" and not is_formula(case)):
                continue
            name = " ".join([path.stem, *(case[key] for key in ("cat", "kind") if key in case)])
            sets.setdefault(name, []).append(case)
    return sets


def is_formula(case: Case) -> bool:
    """Whether answer and truth of a `text` case are boxed or are one formula: prose has no box to find."""
    return all("\\boxed" in text or unwrap(text) != text for text in (str(case["pred"]), str(case["gold"])))


def response_text(case: Case) -> str:
    """What a model would have written."""
    if case["form"] in ("boxed", "output") or "\\boxed" in case["pred"]:
        return case["pred"]
    return f"\\boxed{{{unwrap(case['pred']) if case['form'] == 'text' else case['pred']}}}"


def gold_text(case: Case) -> str:
    gold = str(case["gold"])
    if case["form"] == "text" and "\\boxed" in gold:
        return extract_answer(gold).answer
    return unwrap(gold) if case["form"] == "text" else gold


def unwrap(text: str) -> str:
    """The formula of a text that is one formula between dollar signs, else the text."""
    stripped = text.strip()
    for mark in ("$$", "$"):
        inner = stripped.removeprefix(mark).removesuffix(mark)
        if stripped.startswith(mark) and stripped.endswith(mark) and "$" not in inner and len(stripped) > 2 * len(mark):
            return inner
    return text


def item(text: str, gold: str, number: int) -> tuple[Prompt, Response]:
    prompt = Prompt(prompt_id=str(number), text="", token_ids=(1,), ground_truth=gold)
    return prompt, Response(text=text, token_ids=(1,), logprobs=(0.0,), finish_reason="stop", weight_version=0)


def grade_ours(verifier: RoutingVerifier, cases: Sequence[Case]) -> tuple[list[str], float]:
    items = [item(response_text(case), gold_text(case), number) for number, case in enumerate(cases)]
    begun = time.perf_counter()
    verdicts = verifier.verify(items)
    return [verdict.status for verdict in verdicts], time.perf_counter() - begun


def grade_by_math_verify(text: str, gold: str) -> bool:
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"${gold}$" if "\\boxed" not in gold else gold), parse(text)))
    except Exception:  # whatever it raises is no acceptance
        return False


def grade_theirs(cases: Sequence[Case]) -> tuple[list[str], float]:
    begun = time.perf_counter()
    statuses: list[str] = []
    pool = ProcessPoolExecutor(1)
    for case in cases:
        future = pool.submit(grade_by_math_verify, response_text(case), gold_text(case))
        try:
            statuses.append("correct" if future.result(timeout=10) else "wrong")
        except FutureTimeout:
            statuses.append("timeout")
            for process in list(pool._processes.values()):
                process.kill()
            pool = ProcessPoolExecutor(1)
        except Exception:  # the process died
            statuses.append("grader_error")
            pool = ProcessPoolExecutor(1)
    pool.shutdown()
    return statuses, time.perf_counter() - begun


def score(cases: Sequence[Case], statuses: Sequence[str]) -> dict[str, Any]:
    pairs = [(c["expected"], s == "correct") for c, s in zip(cases, statuses, strict=True) if c["expected"] is not None]
    return {
        "num_cases": len(cases),
        "agreement": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
        "false_positives": sum(b and not a for a, b in pairs),
        "false_negatives": sum(a and not b for a, b in pairs),
        "statuses": dict(Counter(statuses)),
    }


def mixed_with_bombs(
    sets: dict[str, list[Case]], verifier: RoutingVerifier, num_real: int, num_bombs: int
) -> Row | None:
    """Real outputs with bombs among them, and how long one verdict took at the most."""
    real = [c for name, cases in sets.items() if name.startswith(REAL) or name.endswith(REAL) for c in cases]
    bombs = [c for name, cases in sets.items() if name.endswith(" bomb") for c in cases]
    bombs = bombs or [{"pred": f"\\boxed{{{bomb}}}", "gold": "3", "form": "boxed"} for bomb in BOMBS]
    if not real:
        return None
    chance = random.Random(0)
    cases = [chance.choice(real) for _ in range(num_real)]
    for place in chance.sample(range(num_real), num_bombs):
        cases[place] = chance.choice(bombs)
    items = [item(response_text(case), gold_text(case), number) for number, case in enumerate(cases)]
    begun = time.perf_counter()
    verdicts = verifier.verify(items)
    return {
        "set": f"{num_real} real outputs, {num_bombs} bombs",
        "variant": "ours",
        "seconds": time.perf_counter() - begun,
        "longest_verdict_seconds": max(verdict.seconds for verdict in verdicts),
    }


def math500(folder: Path) -> list[tuple[str, str]]:
    """Questions and answers of MATH-500, or of the few in the repository."""
    rows = folder / "math500" / "math500_test.jsonl"
    if rows.exists():
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        return [(row["problem"], str(row["answer"])) for row in found]
    columns = json.loads((SAMPLE / "benchmarks" / "math500" / "math_test_cleaned.json").read_text())
    return [(columns["problem"][key], str(columns["expected_answer"][key])) for key in columns["problem"]]


def restated(folder: Path, verifier: RoutingVerifier, at_most: int | None) -> Row:
    """Boxes every formula of every question: only the truth itself, if it stands there, may be rewarded."""
    items, answers = [], []
    for number, (question, answer) in enumerate(math500(folder)[:at_most]):
        text = question.replace(r"\[", "$$").replace(r"\]", "$$").replace(r"\(", "$").replace(r"\)", "$")
        for double, single in FORMULA.findall(text):
            formula = (double or single).strip().rstrip(".,?")
            prompt, response = item(f"\\boxed{{{formula}}}", answer, number)
            items.append((replace(prompt, text=question), response))
            answers.append((formula, answer))
    counts = {}
    for name, asked in (("", True), (" without the question", False)):
        chosen = items if asked else [(replace(prompt, text=""), response) for prompt, response in items]
        verdicts = verifier.verify(chosen)
        counts[name] = [
            (formula, answer)
            for (formula, answer), verdict in zip(answers, verdicts, strict=True)
            if verdict.reward and normalize(formula).text != normalize(answer).text
        ]
        print(f"restated questions{name}: {len(counts[name])} of {len(items)} rewarded {counts[name]}")
    return {
        "variant": "ours",
        "set": "formulas of MATH-500's questions",
        "num_cases": len(items),
        "restated_questions": len(counts[""]),
        "restated_without_the_question": len(counts[" without the question"]),
    }


def missing_by_answers(verifier: RoutingVerifier, at_most: int | None) -> Row:
    """Answers that are hard on a grader, to truths of every kind: none may be missing."""
    items = [
        item(f"\\boxed{{{bomb}}}", truth, n) for n, truth in enumerate(TRUTHS[:at_most]) for bomb in (*BOMBS, *HARD)
    ]
    verdicts = verifier.verify(items)
    missing = sum(verdict.reward is None for verdict in verdicts)
    longest = max(verdict.seconds for verdict in verdicts)
    print(f"missing verdicts caused by answers: {missing} of {len(items)}, longest verdict {longest:.2f} s")
    found = {"variant": "ours", "set": "answers hard on a grader", "num_cases": len(items)}
    return found | {"missing_caused_by_answers": missing}


def show(name: str, row: dict[str, Any]) -> None:
    agreement = "-" if row["agreement"] is None else f"{row['agreement']:.4f}"
    print(
        f"{name:34}{row['variant']:14}{row['num_cases']:6}{agreement:>9}{row['false_positives']:5}"
        f"{row['false_negatives']:5}{1e3 * row['seconds'] / row['num_cases']:10.2f}"
    )


def main() -> None:
    """Grades everything both ways."""
    parser = bench_parser(__doc__)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder with grader_cases/*.jsonl")
    parser.add_argument("--only", help="substring of the sets to grade")
    parser.add_argument("--alone", action="store_true", help="leave math-verify out")
    parser.add_argument("--errors", action="store_true", help="print every disagreement")
    options = parser.parse_args()
    sets = {k: v for k, v in read_sets(options.data).items() if not options.only or options.only in k}
    sizes, at_most = (NUM_REAL, NUM_BOMBS), None
    if options.tiny:
        sets, sizes, at_most = {name: cases[:NUM_TINY] for name, cases in sets.items()}, (NUM_TINY, 1), 1
    rows: list[dict[str, Any]] = []
    print(f"{'set':34}{'variant':14}{'cases':>6}{'agree':>9}{'FP':>5}{'FN':>5}{'ms/case':>10}")
    graders: dict[str, Callable[[Sequence[Case]], tuple[list[str], float]]] = {}
    section = VerifierSection(num_workers=2, timeout_seconds=1.5, cache_size=0)
    with build_verifier(section, ["math"]) as verifier:
        graders["ours"] = lambda cases: grade_ours(verifier, cases)
        if not options.alone:
            graders["math-verify"] = grade_theirs
        for name, cases in sets.items():
            for variant, grade in graders.items():
                statuses, seconds = grade(cases)
                row = {"set": name, "variant": variant, "seconds": seconds} | score(cases, statuses)
                rows.append(row)
                show(name, row)
                if options.errors and variant == "ours":
                    print_errors(cases, statuses)
        rows += [restated(options.data, verifier, at_most), missing_by_answers(verifier, at_most)]
        if mixed := mixed_with_bombs(sets, verifier, *sizes):
            rows.append(mixed)
            longest = mixed["longest_verdict_seconds"]
            print(f"{mixed['set']}: {mixed['seconds']:.2f} s, longest verdict {longest:.2f} s")
    write_result("verify_math", machine(), rows, options, data=options.data.name)


def print_errors(cases: Sequence[Case], statuses: Sequence[str]) -> None:
    for case, status in zip(cases, statuses, strict=True):
        if case["expected"] is not None and (status == "correct") != case["expected"]:
            print(f"    expected {case['expected']}, {status}: gold {case['gold']!r}  answer {case['pred'][-120:]!r}")


if __name__ == "__main__":
    main()
