"""Verdicts: real programs, reward hacks, and what trips other graders."""

import time

import pytest
from code_cases import LIMITS, NUMBERS, read_cases, squares_problem, status_of, statuses_of

from megatron_prime.verify.code.judge import Limits
from megatron_prime.verify.code.problem import OutputTests
from megatron_prime.verify.code.scoring import score

SHORT = Limits(test_seconds=0.3, total_seconds=3.0)


def _limits(status):
    """Short ones where the end of time is what is expected; on a busy machine anything else may need more."""
    return SHORT if status == "time_limit" else LIMITS


@pytest.mark.parametrize("case", read_cases("hacks_and_forms"), ids=lambda case: case["id"])
def test_hacks_score_nothing_and_legitimate_forms_everything(fork_server, case):
    statuses = statuses_of(fork_server, squares_problem(case["fn_name"]), case["code"])
    assert score(statuses, "fraction_all")[1] == case["expected_score"]


@pytest.mark.parametrize("id", ["hack: __eq__ int subclass (call)", "open(0).read()", "module-level global"])
def test_bubblewrap_agrees(bubblewrap, id):
    (case,) = (case for case in read_cases("hacks_and_forms") if case["id"] == id)
    statuses = statuses_of(bubblewrap, squares_problem(case["fn_name"]), case["code"], stop_at_failure=True)
    assert score(statuses, "all_or_nothing")[1] == case["expected_score"]


def test_statuses_of_evalplus(fork_server):
    cases = read_cases("evalplus")
    passed = [
        status_of(fork_server, {"assert_code": c["test"], "entry_point": c["entry_point"]}, c["code"]) == "pass"
        for c in cases
    ]
    assert len(cases) == 40 and passed == [case["expected"] for case in cases]


def test_reference_solutions_pass(fork_server):
    for row in read_cases("humaneval"):
        content = {"assert_code": row["test"], "entry_point": row["entry_point"], "prefix_code": row["prompt"]}
        assert status_of(fork_server, content, row["prompt"] + row["canonical_solution"]) == "pass", row["task_id"]
    for row in read_cases("mbpp"):
        content = {"assert_code": row["test_list"], "setup_code": "\n".join(row["test_imports"])}
        assert status_of(fork_server, content, row["code"]) == "pass", row["task_id"]


def test_partial_credit_of_the_released_grader(fork_server):
    for row in read_cases("verl_prime_code"):
        problem = OutputTests(row["inputs"], row["outputs"]).first(10)
        content = {"inputs": problem.inputs, "outputs": problem.outputs}
        assert score(statuses_of(fork_server, content, row["code"]), "prime_fraction")[1] == row["expected_score"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print(int(input()) ** 2 + 7)", "pass"),
        ("print(0)", "wrong_answer"),
        ("def f(:", "compile_error"),
        ("x = '\0'", "compile_error"),
        ("raise ValueError", "runtime_error"),
        ("print(int(input()) ** 2 + 7)\nraise SystemExit(1)", "runtime_error"),
        ("print(int(input()) ** 2 + 7)\nraise SystemExit", "pass"),
        ("import os\nprint(int(input()) ** 2 + 7, flush=True)\nos._exit(0)", "pass"),
        ("import os\nos.abort()", "runtime_error"),
        *((f"print(3)\nraise SystemExit({status})", "runtime_error") for status in (2, 97, 255)),
        ("x = bytearray(3 << 30)", "memory_limit"),
        ("print('x' * (3 << 20))", "output_limit"),
        ("import time\ntime.sleep(9)", "time_limit"),
        ("while True: pass", "time_limit"),
        ("import sys\nsys.stdout.buffer.write(str(int(input()) ** 2 + 7).encode())", "pass"),
        ("import atexit\nn = int(input())\natexit.register(lambda: print(n * n + 7))", "pass"),
        ("import threading\nn = int(input())\nthreading.Thread(target=lambda: print(n * n + 7)).start()", "pass"),
        ("if __name__ == '__main__':\n    print(int(input()) ** 2 + 7)", "pass"),
    ],
)
def test_statuses_of_programs(fork_server, code, status):
    content = {"inputs": ["3\n"], "outputs": ["16\n"]}
    assert status_of(fork_server, content, code, _limits(status)) == status


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def f(n): return n * n + 7", "pass"),
        ("class Solution:\n    def f(self, n: int) -> List[int]: return [n * n + 7][0]", "pass"),
        ("import numpy as np\ndef f(n): return np.int64(n) ** 2 + 7", "pass"),
        ("def f(n): print('noise'); return n * n + 7", "pass"),
        ("def f(n): return str(n * n + 7)", "wrong_answer"),
        ("def f(n): return None", "wrong_answer"),
        ("def f(n): return lambda: 16", "wrong_answer"),
        ("def f(n):\n    x = []\n    x.append(x)\n    return x", "runtime_error"),
        ("def g(n): return 0", "runtime_error"),
        ("def f(n): return 'x' * (17 << 20)", "output_limit"),
        ("def f(n): raise SystemExit(0)", "runtime_error"),
        ("import os\ndef f(n): os._exit(0)", "runtime_error"),
        ("import os\ndef f(n): os._exit(97)", "runtime_error"),
        ("import os\nos._exit(97)", "runtime_error"),
        ("def f(n): return bytearray(3 << 30)", "memory_limit"),
        ("def f(n):\n    while True: pass", "time_limit"),
        ("while True: pass", "time_limit"),
        ("raise ValueError", "runtime_error"),
        ("def f(n) return", "compile_error"),
    ],
)
def test_statuses_of_functions(fork_server, code, status):
    content = {"fn_name": "f", "inputs": [[3]], "outputs": [16]}
    assert status_of(fork_server, content, code, _limits(status)) == status


def test_a_function_keeps_its_state_and_survives_its_own_errors(fork_server):
    code = "seen = []\ndef f(n):\n    seen.append(n)\n    if n == 2: raise ValueError\n    return len(seen)"
    content = {"fn_name": "f", "inputs": [[1], [2], [3]], "outputs": [1, 2, [3]]}
    assert statuses_of(fork_server, content, code) == ["pass", "runtime_error", "pass"]


LEAVE = """
import os, time
from megatron_prime.verify.code.sandbox import wire
def leave(descriptor):
    time.sleep(0.3)
    os._exit(0)
wire.receive = leave
def f(n): return n
"""


@pytest.mark.parametrize(
    "content",
    [{"fn_name": "f", "inputs": [[3]], "outputs": [3]}, {"assert_code": "assert f(3) == 3"}],
    ids=["call", "assert"],
)
def test_a_program_that_leaves_its_request_unread_fails(fork_server, content):
    assert status_of(fork_server, content, LEAVE) == "runtime_error"


@pytest.mark.parametrize(
    "content",
    [{"fn_name": "f", "inputs": [[3]], "outputs": [16]}, {"assert_code": "assert f(3) == 16"}],
    ids=["call", "assert"],
)
@pytest.mark.parametrize("message", ["b'{}'", "b'[]' * 2**17", "b'?' * 2**16"])
def test_a_program_that_never_stops_talking_is_stopped(fork_server, content, message):
    code = f"import os, struct\ndata = {message}\nwhile True: os.write(3, (struct.pack('=I', len(data)) + data) * 100)"
    start = time.monotonic()
    assert status_of(fork_server, content, code) == "output_limit"
    assert time.monotonic() - start < 15.0


FORGE = "from megatron_prime.verify.code.sandbox import wire\nwire.encode = lambda *_: {}\ndef f(n): return n"


@pytest.mark.parametrize(
    "message",
    [
        '{"Fraction": "1e200000000"}',
        '{"dict": [[{"Decimal": "0"}, 0], [{"int": format(2**61 - 1 << 2**22, "x")}, 0]]}',
        '{"dict": [[{"int": "f" * 5000}, 0], [1, 0]]}',
        '{"dict": [[k * (2**61 - 1), 0] for k in range(100_000)]}',
        '{"set": [k * (2**61 - 1) for k in range(100_000)]}',
    ],
    ids=["fraction", "decimal beside a long int", "long int", "equal hashes", "set"],
)
def test_no_value_of_a_program_keeps_its_judge_busy_or_ends_it(fork_server, message):
    content = {"fn_name": "f", "inputs": [[3]], "outputs": [{"1": 0, "2": 0}]}
    start = time.monotonic()
    assert status_of(fork_server, content, FORGE.format(message)) in ("wrong_answer", "output_limit")
    assert time.monotonic() - start < 5.0


def test_a_dictionary_may_have_numbers_and_tuples_as_keys(fork_server):
    content = {"fn_name": "f", "inputs": [[3]], "outputs": [{"3": [3], "(3, 4)": True, "true": None}]}
    assert status_of(fork_server, content, "def f(n): return {n: (n,), (n, n + 1): n == 3, True: None}") == "pass"


def test_after_two_time_outs_the_rest_is_not_run(fork_server):
    code = "def f(n):\n    while n > 1: pass\n    return n * n + 7"
    start = time.monotonic()
    statuses = statuses_of(fork_server, squares_problem("f"), code, Limits(test_seconds=0.5, total_seconds=5.0))
    assert statuses == ["pass", "time_limit", "time_limit", *["not_run"] * 7]
    assert time.monotonic() - start < 4.0
    slow = "import time\nn = int(input())\ntime.sleep(0.2)\nprint(n * n + 7)"
    statuses = statuses_of(fork_server, squares_problem(), slow, Limits(test_seconds=1.0, total_seconds=1.5))
    assert statuses[:2] == ["pass", "pass"] and statuses.count("not_run") >= 2


def test_one_failure_can_be_enough(fork_server):
    statuses = statuses_of(fork_server, squares_problem(), "print(8)", stop_at_failure=True)
    assert statuses == ["pass", "wrong_answer", *["not_run"] * 8]


ASSERTIONS = {"assert_code": [f"assert f({n}) == {n * n + 7}" for n in NUMBERS]}


@pytest.mark.parametrize(
    "code",
    [
        "class E:\n    def __eq__(self, other): return True\ndef f(n): return E()",
        "class E(int):\n    def __eq__(self, other): return True\ndef f(n): return E(0)",
        "import os\ndef f(n): os._exit(0)",
        "import os\nos._exit(0)",
        "def f(n): raise SystemExit(0)",
        "def f(n): raise AssertionError",
        "def f(n): raise StopIteration",
        "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.all = lambda x: True\ndef f(n): return 0",
        "import sys\nsys.settrace(lambda *a: None)\ndef f(n): return sys._getframe(1).f_locals.get('expected', 0)",
        "import unittest.mock\ndef f(n): return unittest.mock.ANY",
        "f = 7",
        "",
    ],
)
def test_assertions_cannot_be_talked_round(fork_server, code):
    assert "pass" not in statuses_of(fork_server, ASSERTIONS, code, SHORT)


@pytest.mark.parametrize(
    ("tests", "code", "status"),
    [
        ("assert abs(f(1) - 5) < 1e-6", "def abs(x): return 0\ndef f(n): return 0", "wrong_answer"),
        ("assert all(map(f, [1, 2]))", "def f(n): raise StopIteration", "runtime_error"),
        ("assert math.isclose(f(1), 5)", "class math:\n    isclose = print\ndef f(n): return 0", "wrong_answer"),
        ("assert math.isclose(f(1), 5)", "def f(n): return 5.0", "pass"),
        ("assert sum(1, 2) == 4", "def sum(a, b): return 4", "pass"),
        ("x = [3, 1]\nf(x)\nassert x == [1, 3]", "def f(x): x.sort()", "pass"),
        ("assert list(f(3)) == [0, 1, 2]", "def f(n): yield from range(n)", "pass"),
        ("assert f(2).value == 2 and str(f(3)) == 'B3'", "class B:\n    def __init__(s, n): s.value = n\n    "
         "def __str__(s): return f'B{s.value}'\ndef f(n): return B(n)", "pass"),
        ("s = Solution()\nassert s.f(x=1) == (1, {2})", "class Solution:\n    def f(s, x): return x, {x + 1}", "pass"),
        ("assert f(B(2)) == 2", "class B:\n    def __init__(s, n): s.n = n\ndef f(b): return b.n", "pass"),
        ("try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False", "def f(n): return {}[n]", "pass"),
        ("assert f(1)", "import re\ndef f(n): return re.search('a', 'b')", "wrong_answer"),
        ("assert f(1) == 1", "def f(n): return n\nif __name__ == '__main__':\n    f(input())", "pass"),
        ("assert f(1) ==", "def f(n): return n", "bad_tests"),
        ("assert f(1) == 1", "def f(n):\n    while True: pass", "time_limit"),
        ("assert f(1) == 1", "def f(n): return bytearray(3 << 30)", "memory_limit"),
        ("assert f(1) == 1", "def f(n", "compile_error"),
        ("assert f(1) == 1", "import os\ndef f(n): os._exit(97)", "runtime_error"),
    ],
)  # fmt: skip
def test_assertions(fork_server, tests, code, status):
    assert status_of(fork_server, {"assert_code": tests}, code, _limits(status)) == status


@pytest.mark.parametrize(
    ("setup", "code", "status"),
    [
        ("obj = Foo()", "class Foo:\n    def f(self, x): return 2", "pass"),
        ("obj = Foo()", "class Foo:\n    def f(self, x): return 3", "wrong_answer"),
        ("obj = Foo()", "x = 1", "runtime_error"),
        ("obj = Foo()", "class Foo:\n    def __init__(self): raise ValueError", "runtime_error"),
        ("obj = Foo()", "class Foo:\n    def __init__(self): raise AssertionError", "runtime_error"),
        ("obj = Foo()", "class Foo:\n    def __init__(self): raise SystemExit", "runtime_error"),
        ("obj = Foo()", "class Foo:\n    def __init__(self): bytearray(3 << 30)", "memory_limit"),
        ("obj = Foo()", "class Foo:\n    def __init__(self):\n        while True: pass", "time_limit"),
        ("obj = Foo()", "import os\nclass Foo:\n    def __init__(self): os._exit(1)", "runtime_error"),
        ("obj = Foo.make()", "class Foo: pass", "runtime_error"),
        ("try:\n    obj = Foo()\nexcept ValueError as error:\n    raise KeyError from error",
         "class Foo:\n    def __init__(self): raise ValueError", "runtime_error"),
        ("try:\n    obj = Foo()\nexcept NameError:\n    obj = {}['Foo']", "x = 1", "runtime_error"),
        ("try:\n    obj = Bar()\nexcept NameError:\n    obj = Foo()",
         "class Foo:\n    def f(self, x): return 2", "pass"),
        ("import missing_module\nobj = Foo()", "x = 1", "bad_tests"),
        ("obj = {}['Foo']", "x = 1", "bad_tests"),
        ("raise SystemExit", "x = 1", "bad_tests"),
        ("obj = Foo(", "x = 1", "bad_tests"),
    ],
)  # fmt: skip
def test_setup_code_that_fails_because_of_the_program_is_no_fault_of_the_tests(fork_server, setup, code, status):
    content = {"assert_code": ["assert obj.f(1) == 2", "assert True"], "setup_code": setup}
    statuses = statuses_of(fork_server, content, code, _limits(status))
    assert score(statuses, "all_or_nothing")[0] == status
    # A program that passes some tests without its setup would have partial credit for nothing.
    assert status in ("pass", "wrong_answer") or "pass" not in statuses


def test_a_checker_of_the_data_set(fork_server):
    checker = {"code": "def check(input, output, expected):\n    return sorted(output) == sorted(expected)"}
    content = {"inputs": ["x"], "outputs": ["ab"], "checker": checker}
    assert status_of(fork_server, content, "print('ba', end='')") == "pass"
    assert status_of(fork_server, content, "print('bb', end='')") == "wrong_answer"
    broken = {**content, "checker": {"code": "def check(input, output, expected): return 1 / 0"}}
    assert status_of(fork_server, broken, "print('ba')") == "bad_tests"


@pytest.mark.parametrize(
    ("body", "output", "status"),
    [
        ("return int(output) == int(expected)", "", "wrong_answer"),
        ("return int(output) == int(expected)", "x", "wrong_answer"),
        ("return int(output) == int(expected)", "12", "pass"),
        ("while output != expected: pass\n    return True", "13", "wrong_answer"),
        ("return len(bytes(int(output))) == 12", "9" * 12, "wrong_answer"),
        ("import os\n    if output != expected: os._exit(0)\n    return True", "13", "wrong_answer"),
        ("return int(input) == int(output)", "12", "bad_tests"),
        ("while True: pass", "12", "bad_tests"),
        ("return", "12", "wrong_answer"),
        ("return (", "12", "bad_tests"),
    ],
)
def test_a_checker_that_fails_at_the_right_output_too_is_at_fault(fork_server, body, output, status):
    checker = {"code": f"def check(input, output, expected):\n    {body}"}
    content = {"inputs": ["x"], "outputs": ["12"], "checker": checker}
    limits = SHORT if "while" in body else LIMITS
    assert status_of(fork_server, content, f"print({output!r}, end='')", limits) == status


def test_a_checker_that_hangs_is_tried_again_within_the_time_of_all_tests(fork_server):
    checker = {"code": "def check(input, output, expected):\n    while True: pass"}
    content = {"inputs": ["", ""], "outputs": ["", ""], "checker": checker}
    start = time.monotonic()
    limits = Limits(test_seconds=1.0, total_seconds=1.5)
    assert statuses_of(fork_server, content, "pass", limits) == ["time_limit", "not_run"]
    assert time.monotonic() - start < 2.5


def test_an_output_too_long_for_the_checker_is_a_wrong_one(fork_server):
    checker = {"code": "def check(input, output, expected):\n    return output == expected"}
    content = {"inputs": [""], "outputs": ["a" * 2**20], "checker": checker}
    # As JSON each of these characters takes six.
    assert status_of(fork_server, content, "print('\\0' * (3 * 2**20), end='')") == "wrong_answer"
