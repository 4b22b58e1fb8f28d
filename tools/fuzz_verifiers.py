"""Feeds the verifiers what nobody would write by hand, for as long as asked, and checks every verdict.

Answers, ground truths, programs and tests are put together at random from pieces that matter to the graders. Whatever
comes in, a verdict must come out: one of the listed statuses, the reward that belongs to it, and in time. Prints how
often each was reached; the first violation ends it with the smallest input found for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import CodeVerifierSection, VerifierSection
from megatron_prime.verify.code.scoring import MISSING, STATUSES
from megatron_prime.verify.math.verifier import REWARDS
from megatron_prime.verify.routing import RoutingVerifier, build_verifier

SECTION = VerifierSection(
    num_workers=2, timeout_seconds=1.0, code=CodeVerifierSection(test_seconds=0.3, total_seconds=1.0, memory_gib=0.5)
)
MAX_SECONDS = 8.0
"""Of one verdict: the limits, what a killed worker may take beyond them, and a busy machine."""
PATIENCE_SECONDS = 60.0
BATCH = 8

PIECES = r"""
\boxed{ } \fbox { ( ) [ ] \{ \} \frac \dfrac \sqrt \sqrt[3] \pi \infty \cdot \times \pm \le \in \cup \{1,2\} \text{
\mathrm{ \left( \right) \begin{pmatrix} \end{pmatrix} & \\ ^ _ ^{ _{ , ; : = \approx ! % \% \$ $ $$ n! 0.\overline{3}
\sum_{n=1}^{9} \int_0^1 \lim \log \sin \circ cm \text{cm} or and x=5 + - 5 __import__('os') eval(
"""
ATOMS = r"x y e i n 0 1 2 7 10 0.5 .5 1,000 1e5 10^{10} \pi \infty 1/2 5! (A) [0,1) \binom{5}{2} 10\% 3\,\text{cm}"
RESTATED = (
    *(
        r"\sum_{k=1}^{9} k",
        r"\int_0^1 x^2 dx",
        r"\gcd(48,36)",
        r"17 \bmod 5",
        "5!",
        r"\binom{5}{2}",
        "2+3",
        r"2 \cdot 3",
    ),
    *(
        r"\sqrt{25}",
        "2^{10}",
        r"\lfloor 3.7 \rfloor",
        "|-5|",
        r"\log_2 8",
        "42 minus one",
        r"42\text{ million}",
        "43 = 42",
    ),
    *(
        r"42 \approx 43",
        "1, 2, ...",
        "12_7",
        "x^2 = 25",
        "5 = 5",
        r"\text{The answer is not } 5",
        "9^{9^{9^9}}",
        "答案：5",
    ),
    *(
        "5 个",
        "0,5",
        "100, 200",
        r"5 \text{ or } 6",
        r"\pm 5",
        "x < 5",
        r"5 \pmod 7",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
    ),
    *(r"x_{\max} = 5", "f(x) = 5", r"\frac{\pi}{2}^\circ", "pi/2", "sqrt(2)", "3 1/2", "(C) 5", r"5\%", "5 (apples)"),
)
"""Answers that say more, or less, than an answer."""
LATEX = [*PIECES.split(), *"°½√π∞−×·５\u200b\0", "\n", "9" * 5000]
OPERATORS = ("+", "-", r"\cdot ", "/", ",", "=", "^", r"\pm ", r"\le ", r"\text{ or }")
FORMS = (
    *(r"\frac{{{}}}{{2}}", r"\sqrt{{{}}}", r"2^{{{}}}", r"\text{{{}}}", r"\sin {}"),
    *("({})", "[{}]", r"\{{{}\}}", "-{}", "{}!"),
)
CODE = (
    "n = int(input())",
    "print(n + 1)",
    "print(2)",
    "def f(x):",
    "    return x + 1",
    "    yield x",
    "    raise SystemExit",
    "    return f(x)",
    "class Solution:",
    "    def f(self, x): return x + 1",
    "import sys, os",
    "sys.exit(0)",
    "os._exit(0)",
    "os.fork()",
    "os.kill(os.getppid(), 9)",
    "while True: pass",
    "x = [0] * 10**9",
    "sys.stdout.write('x' * 10**7)",
    "os.close(1)",
    "[os.close(n) for n in range(64)]",
    "open(0).read()",
    "open('/tmp/a', 'w').write('1')",
    "raise ValueError",
    "assert False",
    "os.write(3, b'\\0' * 99)",
    "os.write(4, b'{}')",
    "import threading; threading.Thread(target=print).start()",
    "sys.setrecursionlimit(10**9)",
    "sys.stdin = None",
    "print(int('9' * 5000))",
    "\0",
    "```",
    "```python",
    "~~~python",
    "\ud800",
    "def f(x): return float('nan')",
    "def isclose(*a): return True",
    "def ref(x): return f(x)",
    "def f(a): a.clear()",
    "class Node: __eq__ = lambda s, o: True",
    "os.fchmod(2, 0)",
    "print(sys.stdin.mode, __file__)",
)
PROBLEMS: tuple[object, ...] = (
    {"inputs": ["1", "2"], "outputs": ["2", "3"]},
    {"inputs": [[1], [2]], "outputs": [2, 3], "fn_name": "f"},
    {"assert_code": ["assert f(1) == 2", "assert f(2) == 3"]},
    {"assert_code": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "f"},
    {"assert_code": "assert f(1) == ref(1)", "prefix_code": "def ref(x): return x + 1"},
    {"assert_code": "assert isclose(f(1), 2)"},
    {"assert_code": "a = [2, 1]\nassert f(a) == sorted(a)", "setup_code": "b = f([1])"},
    {"assert_code": "from solution import f\n\ndef test_f():\n    assert f(1) == 2"},
    {"assert_code": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "Solution().f"},
    [{"input": "1", "output": "2", "testtype": "stdin"}],
    {"fn_name": "f", "inputs": [["1"]], "outputs": ["null"]},
    {"inputs": ["1"], "outputs": ["2"], "checker": {"code": "def check(input, output, expected): return output"}},
)

_formula = st.lists(st.sampled_from(LATEX), max_size=12).map(" ".join) | st.text(max_size=30)
_expression = st.recursive(
    st.sampled_from(ATOMS.split()),
    lambda inner: (
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map("".join)
        | st.tuples(st.sampled_from(FORMS), inner).map(lambda pair: pair[0].format(pair[1]))
    ),
    max_leaves=8,
)
_restated = st.sampled_from(RESTATED) | st.tuples(
    st.sampled_from(RESTATED), st.sampled_from(OPERATORS), _expression
).map("".join)
_answer = (_expression | _restated).map(lambda text: f"so \\boxed{{{text}}}")
_boxed = st.tuples(_formula, _formula).map(lambda pair: f"{pair[0]}\\boxed{{{pair[1]}}}")
_repeated = st.tuples(_formula, st.integers(1, 2000)).map(lambda pair: pair[0] * pair[1])
_math_answer = _answer | _answer | _answer | _boxed | _repeated
_gold = st.sampled_from(RESTATED) | st.sampled_from(
    ["5", r"\frac{1}{2}", "(1, 2)", r"\{1, 2\}", "x+1", r"x \in [0, 1]"]
)
_lines = st.lists(st.sampled_from(CODE), max_size=6).map("\n".join)
_fenced = _lines.map(lambda text: f"```python\n{text}\n```")
_program = _fenced | _fenced | _lines | st.text(max_size=40)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["inputs", "outputs", "fn_name", "assert_code", "entry_point", "checker", "code"]), inner
        )
    ),
    max_leaves=8,
)
_good_tests = st.sampled_from(PROBLEMS).map(json.dumps)
_tests = _good_tests | _good_tests | _json.map(json.dumps)
_cases = st.tuples(st.just("math"), _gold | _expression | _formula, _math_answer) | st.tuples(
    st.just("code"), _tests, _program
)
Case = tuple[str, str, str]


def submit_all(verifier: RoutingVerifier, cases: Sequence[Case]) -> list[Verdict]:
    """The verdicts of (ability, ground truth, answer)."""
    pending = []
    for ability, truth, answer in cases:
        prompt = Prompt(prompt_id="fuzz", text="", token_ids=(), ground_truth=truth, ability=ability)
        response = Response(text=answer, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
        pending.append(verifier.submit(prompt, response))
    return [future.result(timeout=PATIENCE_SECONDS) for future in pending]


def check(case: Case, verdict: Verdict) -> None:
    """Raises AssertionError where a verdict is none of the listed ones, comes late or has the wrong reward."""
    if case[0] == "math":
        assert verdict.status in REWARDS and verdict.reward == REWARDS[verdict.status], verdict
    else:
        assert verdict.status in STATUSES, verdict
        missing = verdict.status in MISSING
        assert (verdict.reward is None) if missing else verdict.reward == float(verdict.status == "pass"), verdict
    assert verdict.seconds < MAX_SECONDS, verdict


class _Failures(logging.Handler):
    """Errors inside a verifier, which cost a run no more than a verdict and a line in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def listen(self, action: Callable[[], None]) -> None:
        """Does something and hears what fails meanwhile."""
        logger = logging.getLogger("megatron_prime.verify.plugin")
        logger.addHandler(self)
        try:
            action()
        finally:
            logger.removeHandler(self)


def fuzz(verifier: RoutingVerifier, number: int, num_batches: int) -> Counter[str]:
    """Checks batches of cases drawn from a seed; the statuses that came."""
    statuses: Counter[str] = Counter()
    failures = _Failures()

    @seed(number)
    @settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.lists(_cases, min_size=BATCH, max_size=BATCH))
    def run(cases: list[Case]) -> None:
        failures.messages.clear()
        for case, verdict in zip(cases, submit_all(verifier, cases), strict=True):
            check(case, verdict)
            statuses[f"{case[0]}: {verdict.status}"] += 1
        assert not failures.messages, failures.messages

    failures.listen(run)
    return statuses


def main() -> None:
    """Runs until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each round has the next one")
    options = parser.parse_args()
    end, number = time.monotonic() + 60 * options.minutes, options.seed
    statuses: Counter[str] = Counter()
    with build_verifier(SECTION, ["math", "code"]) as verifier:
        while time.monotonic() < end:
            statuses += fuzz(verifier, number, num_batches=300)
            number += 1
    seeds = f"seeds {options.seed} to {number - 1}"
    print(f"{statuses.total()} verdicts in {options.minutes:g} minutes, {seeds}; no violation")
    for status, count in statuses.most_common():
        print(f"  {status:24}{count}")


if __name__ == "__main__":
    main()
