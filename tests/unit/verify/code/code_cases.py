"""Cases of tests/data/code_cases and short ways to judge them."""

import json
from pathlib import Path

from megatron_prime.verify.code.judge import Limits, judge
from megatron_prime.verify.code.problem import parse_problem
from megatron_prime.verify.code.scoring import score

FOLDER = Path(__file__).parents[3] / "data" / "code_cases"
LIMITS = Limits(test_seconds=5.0, total_seconds=20.0)
NUMBERS = range(1, 11)


def read_cases(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def squares_problem(fn_name=None):
    """n * n + 7 for ten numbers, by standard input or by calls."""
    if fn_name is None:
        return {"inputs": [f"{n}\n" for n in NUMBERS], "outputs": [f"{n * n + 7}\n" for n in NUMBERS]}
    return {"fn_name": fn_name, "inputs": [[n] for n in NUMBERS], "outputs": [n * n + 7 for n in NUMBERS]}


def statuses_of(launcher, content, code, limits=LIMITS, **options):
    return judge(launcher, limits, parse_problem(json.dumps(content)), code, **options)


def status_of(launcher, content, code, limits=LIMITS):
    return score(statuses_of(launcher, content, code, limits), "all_or_nothing")[0]
