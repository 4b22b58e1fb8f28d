"""Tests as data sets write them, and scores."""

import json

import pytest

from megatron_prime.verify.code.problem import AssertTests, CallTests, OutputTests, ProblemError, parse_problem
from megatron_prime.verify.code.scoring import num_tests_to_run, score


def test_reads_every_form():
    assert parse_problem('{"inputs": ["1\\n", ["2", "3"]], "outputs": [4, "5"]}') == OutputTests(
        ["1\n", "2\n3"], ["4", "5"]
    )
    assert parse_problem('{"inputs": [""], "outputs": ["1"], "fn_name": null, "checker": "lines"}').checker == "lines"
    own = parse_problem('{"inputs": [""], "outputs": [""], "checker": {"code": "def check(i, o, e): return True"}}')
    assert own.checker == "" and own.checker_code.startswith("def check")
    calls = parse_problem('{"fn_name": "f", "inputs": [[1, "a"], "2\\n[3]"], "outputs": ["4", "abc"]}')
    assert calls == CallTests("f", [[1, "a"], [2, [3]]], [(4, "4"), ("abc",)])
    assert parse_problem('{"assert_code": "assert f()"}') == AssertTests(["assert f()"])
    whole = {"assert_code": ["assert a", "b"], "setup_code": "s", "prefix_code": "p", "entry_point": "f"}
    assert parse_problem(json.dumps(whole)) == AssertTests(["assert a", "b"], "s", "p", "f")
    assert parse_problem(json.dumps(whole)).first(1).pieces == ["assert a"]


def test_reads_lists_of_tests():
    stdin = [{"input": "4\n", "output": "8\n", "testtype": "stdin"}]
    assert parse_problem(json.dumps(stdin)) == OutputTests(["4\n"], ["8\n"])
    assert parse_problem(json.dumps({"assert_code": json.dumps(stdin)})) == OutputTests(["4\n"], ["8\n"])
    assert parse_problem(json.dumps({"assert_code": stdin})) == OutputTests(["4\n"], ["8\n"])
    wrapped = [{"fn_name": "f", "input": [[4]], "output": [8], "type": "function_call"}]
    assert parse_problem(json.dumps(wrapped)) == CallTests("f", [[4]], [(8,)])
    lines = [{"input": "[1]\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "g"}}]
    assert parse_problem(json.dumps(lines)) == CallTests("g", [[[1], 2]], [(3, "3")])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no JSON object"),
        ("{}", "neither"),
        ('{"inputs": [], "outputs": []}', "no tests"),
        ('{"assert_code": []}', "no tests"),
        ('{"inputs": ["1"], "outputs": []}', "same length"),
        ('{"inputs": "1", "outputs": "1"}', "same length"),
        ('{"inputs": ["1"], "outputs": ["1"], "fn_name": 3}', "fn_name"),
        ('{"inputs": ["1"], "outputs": ["1"], "checker": "fuzzy"}', "checker must be one of tokens"),
        ('{"inputs": ["1"], "outputs": ["1"], "checker": {}}', "checker"),
        ('{"assert_code": 3}', "assert_code"),
        ('{"assert_code": "x", "entry_point": ["f"]}', "entry_point"),
        ('{"assert_code": "f(1) == 2"}', "assert nothing"),
        ('{"assert_code": "assert f()", "entry_point": "f(1)"}', "entry_point"),
        ('{"inputs": ["1", "2"], "outputs": ["", "\\n"]}', "does nothing would pass"),
        ('{"language": "python", "test_cases": []}', "'language', 'test_cases'"),
        ('[{"input": "1", "output": "2", "testtype": "interactive"}]', "interactive"),
        ('[{"input": "1", "output": "2", "testtype": "functional"}]', "fn_name"),
        ('[{"in": "1", "out": "2"}]', "input and output"),
    ],
)
def test_says_what_is_wrong_with_tests(text, problem):
    with pytest.raises(ProblemError, match=problem):
        parse_problem(text)


@pytest.mark.parametrize(
    ("statuses", "mode", "result"),
    [
        (["pass"] * 3, "all_or_nothing", ("pass", 1.0)),
        (["pass", "wrong_answer", "not_run"], "all_or_nothing", ("wrong_answer", 0.0)),
        (["pass", "wrong_answer", "time_limit", "pass"], "fraction_all", ("wrong_answer", 0.5)),
        (["pass", "time_limit", "time_limit", "not_run"], "fraction_all", ("time_limit", 0.25)),
        (["pass", "not_run"], "fraction_all", ("time_limit", 0.5)),
        (["pass"] * 9 + ["wrong_answer"], "prime_fraction", ("wrong_answer", 0.9)),
        (["pass", "harness_error"], "fraction_all", ("harness_error", None)),
        (["bad_tests"], "all_or_nothing", ("bad_tests", None)),
    ],
)
def test_scores(statuses, mode, result):
    assert score(statuses, mode) == result


def test_the_released_rule_looks_at_ten_tests():
    assert [num_tests_to_run(25, mode) for mode in ("all_or_nothing", "fraction_all", "prime_fraction")] == [25, 25, 10]
    assert num_tests_to_run(3, "prime_fraction") == 3
