"""Bad tests are found before anything is sampled."""

import json
import logging
from pathlib import Path

import pytest

from megatron_prime.assembly.preflight import _check_tests, check_programs
from megatron_prime.config import load_config
from megatron_prime.config.schema import FileData
from megatron_prime.data.files import FilePrompts
from megatron_prime.errors import DataError

ROOT = Path(__file__).parents[4]
GOOD = {"assert_code": "assert f(1) == 2"}
NOTHING_ASSERTED = {"assert_code": "f(1)"}
ANYTHING_PASSES = {"assert_code": "assert not f(1)"}


@pytest.fixture(scope="module")
def config():
    return load_config(str(ROOT / "configs" / "arithmetic.yaml"), [])


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*symbols, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def _prompts(folder, tokenizer, *tests):
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": f"Task {n}", "ability": "code", "reward_model": {"ground_truth": json.dumps(truth)}}
        for n, truth in enumerate(tests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FilePrompts(FileData(train=[str(path)], template="raw", abilities=["code"]), tokenizer, seed=1)


def test_tests_that_cannot_be_read_are_a_warning_and_an_error_where_all_are_so(tmp_path, tokenizer, config, caplog):
    with caplog.at_level(logging.WARNING):
        _check_tests(config, _prompts(tmp_path, tokenizer, GOOD, NOTHING_ASSERTED, {"test_cases": []}))
    assert "2 of 3 problems with programs have bad tests" in caplog.text
    assert "row 1: the tests assert nothing" in caplog.text and "'test_cases'" in caplog.text
    with pytest.raises(DataError, match="1 of 1 problems"):
        _check_tests(config, _prompts(tmp_path, tokenizer, NOTHING_ASSERTED))


def test_tests_that_any_program_passes_are_found_by_trying(tmp_path, tokenizer, config, caplog, fork_server):
    with caplog.at_level(logging.WARNING):
        check_programs(config, _prompts(tmp_path, tokenizer, GOOD, ANYTHING_PASSES))
    assert "1 of 2 problems with programs have bad tests" in caplog.text
    assert "row 1: a program that does nothing passes" in caplog.text
    with pytest.raises(DataError, match="does nothing passes"):
        check_programs(config, _prompts(tmp_path, tokenizer, ANYTHING_PASSES))


def test_problems_are_looked_at_all_over_the_rows(tmp_path, tokenizer):
    prompts = _prompts(tmp_path, tokenizer, *[GOOD] * 10)
    assert [where.rpartition(" ")[2] for where in prompts.ground_truths("code", 3)] == ["0", "4", "8"]
    assert prompts.ground_truths("math", 3) == {}


@pytest.fixture
def fork_server():
    from megatron_prime.config.schema_verifier import CodeVerifierSection
    from megatron_prime.errors import VerifierError
    from megatron_prime.verify.code.verifier import choose_isolation

    try:
        choose_isolation(CodeVerifierSection())
    except VerifierError as error:
        pytest.skip(f"no safe way to run programs: {error}")
