"""Programs that would be judged by themselves, and tests that would judge nothing."""

import json

import pytest
from code_cases import LIMITS, read_cases, status_of, statuses_of

from megatron_prime.verify.code.bad_tests import find_bad_tests, what_is_wrong, wrong_programs
from megatron_prime.verify.code.judge import Limits
from megatron_prime.verify.code.problem import parse_problem
from megatron_prime.verify.code.scoring import score

SHORT = Limits(test_seconds=1.0, total_seconds=4.0)


LINKED_LISTS = """
class Node:
    def __init__(self, value, after):
        self.value, self.after = value, after

def make(a):
    return Node(a[0], make(a[1:])) if a else None

def nodes(x):
    return [x.value, *nodes(x.after)] if x else []
"""


def _humaneval(number):
    row = next(row for row in read_cases("humaneval") if row["task_id"] == f"HumanEval/{number}")
    return {"assert_code": row["test"], "entry_point": row["entry_point"], "prefix_code": row["prompt"]}, row


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (32, "def poly(*a): return 0.0\ndef find_zero(xs): return 0.0"),
        (38, "def encode_cyclic(s): return s\ndef decode_cyclic(s): return s"),
        (50, "def encode_shift(s): return s\ndef decode_shift(s): return s"),
    ],
)
def test_what_the_problem_defines_is_not_looked_up_in_the_program(fork_server, number, code):
    content, row = _humaneval(number)
    assert status_of(fork_server, content, code) == "wrong_answer"
    assert status_of(fork_server, content, row["prompt"] + row["canonical_solution"]) == "pass"


@pytest.mark.parametrize("case", read_cases("assertion_attacks"), ids=lambda case: case["id"])
def test_attacks_on_assertions_earn_nothing_and_are_not_missing(fork_server, case):
    statuses = statuses_of(fork_server, case["tests"], case["code"], SHORT)
    assert score(statuses, "all_or_nothing")[1] == 0.0
    assert "pass" not in statuses


@pytest.mark.parametrize(
    ("tests", "code", "status"),
    [
        (
            {"assert_code": "for i in range(5): assert f(i) == ref(i)", "prefix_code": "def ref(x): return x * x + 7"},
            "def ref(x): return 0\ndef f(x): return 0",
            "wrong_answer",
        ),
        (
            {"assert_code": "assert isclose(f(2.0), 4.0)"},
            "def isclose(*a, **k): return True\ndef f(x): return 0.0",
            "wrong_answer",
        ),
        ({"assert_code": "assert isclose(f(2.0), 4.0)"}, "def f(x): return x * x", "pass"),
        (
            {"assert_code": "assert Counter(f('aab')) == Counter({'a': 2, 'b': 1})"},
            "Counter = lambda x: 0\ndef f(x): return 0",
            "runtime_error",
        ),
        ({"assert_code": "assert gcd(4, 6) == 2"}, "def gcd(a, b): return 2", "pass"),
        (
            {"assert_code": "assert sum([1, 2]) == len([1, 2, 3])"},
            "def sum(*a): return 0\ndef len(*a): return 0",
            "wrong_answer",
        ),
        (
            {"assert_code": "a = [3, 1, 2]\nassert f(a) == sorted(a)"},
            "def f(a):\n    a.clear()\n    return []",
            "wrong_answer",
        ),
        ({"assert_code": "a = [3, 1, 2]\nassert f(a) == sorted(a)"}, "def f(a):\n    a.sort()\n    return a", "pass"),
        ({"assert_code": "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"}, "def f(a): a.sort()", "pass"),
        ({"assert_code": "assert not abs(f(2) - 4) > 1e-6"}, "def f(x): return float('nan')", "wrong_answer"),
        ({"assert_code": "assert not abs(f(2)[0] - 4) > 1e-6"}, "def f(x): return [float('nan')]", "wrong_answer"),
        ({"assert_code": "import math\nassert math.isnan(f(2))"}, "def f(x): return float('nan')", "pass"),
        (
            {"assert_code": "assert f(3) == 16", "setup_code": "base = f(1) + 1"},
            "def f(x): return None",
            "runtime_error",
        ),
        (
            {"assert_code": "assert first == 16", "setup_code": "first = make()[0]"},
            "def make(): return []",
            "runtime_error",
        ),
        (
            {"assert_code": "assert m == 16", "setup_code": "m = make()\nassert isinstance(m, list)"},
            "def make(): return 1",
            "runtime_error",
        ),
        (
            {"assert_code": "assert nodes(f(make([1, 2]))) == [2, 1]", "prefix_code": LINKED_LISTS},
            "def f(x):\n    p = None\n    while x: p, x.after, x = x, p, x.after\n    return p",
            "pass",
        ),
    ],
)
def test_no_program_brings_its_own_judge(fork_server, tests, code, status):
    assert status_of(fork_server, tests, code) == status


def test_tests_in_the_manner_of_pytest_are_run(fork_server):
    tests = "from solution import double\n\ndef test_small():\n    assert double(4) == 8\n\n"
    tests += "class TestLarge:\n    def test_it(self):\n        assert double(400) == 800\n"
    for text in (
        tests,
        tests.removeprefix("from solution import double\n"),
        tests.replace("from solution import double", "import solution\ndouble = solution.double"),
    ):
        assert status_of(fork_server, {"assert_code": text}, "def double(n): return 2 * n") == "pass"
        assert status_of(fork_server, {"assert_code": text}, "def double(n): return 8") == "wrong_answer"
        assert status_of(fork_server, {"assert_code": text}, "") == "runtime_error"


@pytest.mark.parametrize("entry_point", ["double", "Solution().double", "Solution.double"])
def test_an_entry_point_may_be_a_method(fork_server, entry_point):
    tests = {"assert_code": "def check(candidate):\n    assert candidate(n=4) == 8", "entry_point": entry_point}
    assert status_of(fork_server, tests, "class Solution:\n    def double(self, n): return 2 * n") == "pass"
    assert status_of(fork_server, tests, "class Solution:\n    def double(self, n): return n") == "wrong_answer"


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ({"assert_code": "def check(candidate):\n    assert candidate(1) == 2"}, "never call the program"),
        ({"assert_code": "assert 1 + 1 == 2"}, "never call the program"),
        ({"assert_code": "def test_f(tmp_path):\n    assert f(1) == 2"}, "test_f takes arguments"),
        ({"assert_code": "from somewhere import g\nassert f(1) == g(1)"}, "No module named 'somewhere'"),
        (
            {"assert_code": "def check(candidate):\n    assert candidate(1) == other(1)", "entry_point": "f"},
            "'other' is not defined",
        ),
        (
            {
                "assert_code": "assert f(1) ==",
            },
            "do not compile",
        ),
        (
            {
                "assert_code": "assert f(1) == helper(1)",
                "prefix_code": "def helper(x): return 2\nimport missing_module",
            },
            "missing_module",
        ),
    ],
)
def test_tests_that_no_program_can_be_judged_by_say_why(fork_server, tests, reason):
    statuses = statuses_of(fork_server, tests, "def f(x): return 2")
    assert score(statuses, "all_or_nothing") == ("bad_tests", None) or "missing_module" in reason
    assert reason in statuses.reason or statuses == ["runtime_error"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (
            {"fn_name": "joined", "inputs": [[[1, 0, 2]]], "outputs": ["102"]},
            "def joined(a): return ''.join(map(str, a))",
        ),
        ({"fn_name": "joined", "inputs": [[[1, 0, 2]]], "outputs": ["102"]}, "def joined(a): return 102"),
        ({"fn_name": "kind", "inputs": [[None]], "outputs": ["null"]}, "def kind(n): return 'null'"),
        ({"fn_name": "kind", "inputs": [[None]], "outputs": ["null"]}, "def kind(n): return None"),
    ],
)
def test_text_that_looks_like_json_may_be_either(fork_server, content, code):
    assert status_of(fork_server, content, code) == "pass"


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nassert (sys.stdin.mode, sys.stdout.mode, sys.stderr.mode) == ('r', 'w', 'w')",
        "import sys\nassert (sys.stdin.name, sys.stdout.name, sys.stderr.name) == ('<stdin>', '<stdout>', '<stderr>')",
        "import sys\nassert sys.stdin.fileno() == 0 and sys.stdout.fileno() == 1 and sys.stdin.buffer.raw.mode == 'rb'",
        "import sys\nprint(5)\nquit()",
        "assert __file__.endswith('.py') and __name__ == '__main__'",
        "from concurrent.futures import ThreadPoolExecutor\nimport time\nwith ThreadPoolExecutor(8) as p:\n"
        "    assert sum(p.map(lambda i: time.sleep(0.05) or i, range(8))) == 28",
        "import sys, threading\nthreading.stack_size(2**27)\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=f, args=(50000,))\nt.start()\nt.join()",
    ],
)
def test_streams_and_threads_are_cpythons(fork_server, code):
    assert status_of(fork_server, {"inputs": [""], "outputs": ["5"]}, f"{code}\nprint(5)") == "pass"


def test_an_expected_number_beyond_all_floats_is_no_infinity(fork_server):
    content = {"inputs": [""], "outputs": ["1e400"]}
    assert status_of(fork_server, content, "print('inf')") == "wrong_answer"
    assert status_of(fork_server, content, "print('1e400')") == "pass"


class _Judge:
    """A verifier of programs in the test's own sandbox."""

    def __init__(self, launcher):
        self._launcher = launcher

    def submit(self, prompt, response):
        from megatron_prime.batch import Verdict
        from megatron_prime.verify.code.extract import extract_code
        from megatron_prime.verify.futures import known

        statuses = statuses_of(self._launcher, json.loads(prompt.ground_truth), extract_code(response.text), LIMITS)
        status, reward = score(statuses, "all_or_nothing")
        return known(Verdict(status=status, reward=reward, reason=statuses.reason))

    def close(self):
        pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"inputs": ["1\n"], "outputs": ["2\n"]}, None),
        ({"inputs": ["1\n"], "outputs": ["0\n"]}, "print(0)"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [2]}, None),
        ({"fn_name": "f", "inputs": [[1], [2]], "outputs": [None, None]}, "does nothing passes"),
        ({"assert_code": "assert f(1) == 2"}, None),
        ({"assert_code": "assert not f(1)"}, "does nothing passes"),
        ({"assert_code": "f(1)\nassert True"}, "does nothing passes"),
        ({"assert_code": "s = Solution()\nassert s.f(1) == 2"}, None),
        ({"assert_code": "s = Solution()\nassert s.f(1) is None"}, "does nothing passes"),
        ({"assert_code": "from solution import f\ndef test_f():\n    assert f(1) == 2"}, None),
        ({"assert_code": "def check(candidate):\n    assert candidate(1) == 2"}, "never call"),
        ({"test_cases": []}, "neither inputs"),
        (
            [{"fn_name": "f", "input": [[4]], "output": [8], "type": "function_call"}],
            None,
        ),
    ],
)
def test_bad_tests_are_found_by_programs_that_do_nothing(fork_server, content, reason):
    found = find_bad_tests(_Judge(fork_server), {"row 1": json.dumps(content)})
    assert (reason is None and found == {}) or reason in found["row 1"]


def test_unreadable_tests_are_found_without_running_anything():
    assert what_is_wrong(json.dumps({"assert_code": "assert f(1) == 2"})) is None
    assert "assert nothing" in str(what_is_wrong(json.dumps({"assert_code": "f(1)"})))


def test_wrong_programs_define_what_the_tests_ask_for():
    problem = parse_problem(json.dumps({"assert_code": "assert f(1) == Node(2).value"}))
    for program in wrong_programs(problem):
        names: dict = {}
        exec(program, names)
        assert callable(names["f"]) and isinstance(names["Node"], type)


def test_a_reply_much_longer_than_the_right_one_is_not_even_read(fork_server):
    content = {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}
    assert status_of(fork_server, content, "def f(x): return [0] * 700_000") == "output_limit"
    longer = {"fn_name": "f", "inputs": [[1]], "outputs": [[0] * 300_000]}
    assert status_of(fork_server, longer, "def f(x): return [0] * 300_000") == "pass"
