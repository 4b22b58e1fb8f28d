"""Prompts and examples from files of every layout."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_prime.batch import Response
from megatron_prime.config.checks import DATA_SUFFIXES
from megatron_prime.config.schema import FileData
from megatron_prime.data.sources import build_prompt_source, build_sft_source
from megatron_prime.data.templates import PRIME_SYSTEM_PROMPT, TASK_SUFFIXES
from megatron_prime.errors import DataError

GSM8K = Path(__file__).parents[2] / "data" / "gsm8k"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EURUS = {
    "data_source": "numina_olympiads",
    "prompt": [
        {"role": "system", "content": PRIME_SYSTEM_PROMPT},
        {"role": "user", "content": "What is 6 times 7?" + TASK_SUFFIXES["math"]},
    ],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 3},
}
LAYOUTS = {
    "eurus": EURUS,
    "gsm8k": {"question": "What is 6 times 7?", "answer": "6*7 = <<6*7=42>>42\n#### 42"},
    "math_answer": {"problem": "What is 6 times 7?", "answer": "42", "solution": "ignored"},
    "math_solution": {"problem": "What is 6 times 7?", "solution": r"First \boxed{1}. So $\boxed{42}$."},
    "amc": {"question": "What is 6 times 7?", "answer": 42.0, "solution": None},
    "math500": {"problem": "What is 6 times 7?", "expected_answer": "42", "solution": "..."},
}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Every byte a token: the length of a prompt in tokens is its length in bytes.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*symbols, "<|im_end|>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    loaded.chat_template = CHAT_TEMPLATE
    return loaded


def _write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_prompt(tmp_path, tokenizer, layout, suffix):
    path = _write(tmp_path / f"data{suffix}", [LAYOUTS[layout]])
    prompt = build_prompt_source(FileData(train=[path]), tokenizer, seed=1).take(0, 1)[0]
    assert prompt.text == (
        f"<|im_start|>system\n{PRIME_SYSTEM_PROMPT}<|im_end|>\n"
        f"<|im_start|>user\nWhat is 6 times 7?{TASK_SUFFIXES['math']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(list(prompt.token_ids)) == prompt.text
    assert (prompt.ground_truth, prompt.ability) == ("42", "math")
    if layout == "eurus":
        assert prompt.data_source == "numina_olympiads" and prompt.extra_info["index"] == 3


def test_pandas_columns(tmp_path, tokenizer):
    columns = {"problem": {"0": "a", "7": "b"}, "answer": {"0": "1", "7": "2"}}
    source = build_prompt_source(FileData(train=[_write(tmp_path / "c.json", columns)]), tokenizer, seed=1)
    assert sorted(prompt.ground_truth for prompt in source.take(0, 2)) == ["1", "2"]


def test_hugging_face_folders(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [LAYOUTS["gsm8k"], LAYOUTS["gsm8k"] | {"answer": "#### 7"}]
    folder = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))
    source = build_prompt_source(FileData(train=[f"hf:{folder}:test"]), tokenizer, seed=1)
    assert sorted(prompt.ground_truth for prompt in source.take(0, 2)) == ["42", "7"]
    with pytest.raises(DataError, match="cannot be loaded"):
        build_prompt_source(FileData(train=[f"hf:{folder}:absent"]), tokenizer, seed=1)


def test_gsm8k_from_disk_is_resumable_and_complete(tokenizer):
    config = FileData(train=[str(GSM8K / "train.jsonl")], evaluation=[str(GSM8K / "test.jsonl")])
    source = build_prompt_source(config, tokenizer, seed=1)
    assert len(source) == 30 and source.dropped.num_dropped == 0
    epoch = source.take(0, 30)
    assert len({prompt.prompt_id for prompt in epoch}) == 30
    assert all(prompt.ground_truth.replace(",", "").isdigit() for prompt in epoch)
    again = build_prompt_source(config, tokenizer, seed=1)
    assert again.take(17, 20) == (epoch + source.take(30, 30))[17:37]
    assert build_prompt_source(config, tokenizer, seed=2).take(0, 30) != epoch
    held_out = source.evaluation(8)
    assert held_out == build_prompt_source(config, tokenizer, seed=2).evaluation(8)
    assert len(source.evaluation(400)) == 20
    response = Response(text="", token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
    assert source.step_spans(epoch[0], response) is None


def test_dropped_rows_are_counted_by_reason(tmp_path, tokenizer):
    rows = [
        LAYOUTS["gsm8k"],
        {"question": "x" * 200, "answer": "#### 1"},
        {"problem": "no box", "solution": "it is 4"},
        {"question": "in both", "answer": "#### 2"},
    ]
    config = FileData(
        train=[_write(tmp_path / "t.jsonl", rows)],
        evaluation=[_write(tmp_path / "e.jsonl", [rows[3]])],
        template="raw",
        system_prompt="none",
        max_prompt_tokens=100,
    )
    source = build_prompt_source(config, tokenizer, seed=1)
    assert len(source) == 1 and source.dropped.num_rows == 4
    assert source.dropped.by_reason == {"too_long": 1, "no_answer": 1, "in_evaluation": 1}
    config.max_prompt_tokens = 5
    assert str(source.dropped).startswith("1 with prompts of more than data.max_prompt_tokens; 1 without an answer")
    with pytest.raises(DataError, match=r"no prompt is left of 4: .*; 1 without"):
        build_prompt_source(config, tokenizer, seed=1)


def test_raw_template_and_options(tmp_path, tokenizer):
    path = _write(tmp_path / "t.jsonl", [LAYOUTS["gsm8k"]])

    def text(**options):
        return (
            build_prompt_source(FileData(train=[path], template="raw", **options), tokenizer, seed=1).take(0, 1)[0].text
        )

    assert text(system_prompt="none", task_suffix=False) == "What is 6 times 7?"
    assert text(system_prompt="none") == "What is 6 times 7?" + TASK_SUFFIXES["math"]
    assert text(task_suffix=False) == PRIME_SYSTEM_PROMPT + "\nWhat is 6 times 7?"


def test_code_questions_get_the_code_suffix(tmp_path, tokenizer):
    tests = '{"inputs": ["####"], "outputs": ["#### 1"]}'
    row = EURUS | {"ability": "code", "prompt": [{"role": "user", "content": "Add."}]}
    row |= {"reward_model": {"style": "rule", "ground_truth": tests}}
    config = FileData(train=[_write(tmp_path / "t.jsonl", [row])], abilities=["math", "code"])
    prompt = build_prompt_source(config, tokenizer, seed=1).take(0, 1)[0]
    assert prompt.ability == "code" and "Add." + TASK_SUFFIXES["code"] in prompt.text
    assert prompt.ground_truth == tests


def test_rows_of_other_abilities_are_left_out_and_counted(tmp_path, tokenizer):
    code = EURUS | {"ability": "code", "reward_model": {"style": "rule", "ground_truth": ""}}
    mixed = _write(tmp_path / "mixed.jsonl", [code, EURUS, code])
    held_out = _write(tmp_path / "held_out.jsonl", [code, LAYOUTS["gsm8k"] | {"question": "What is 7 times 6?"}])
    source = build_prompt_source(FileData(train=[mixed], evaluation=[held_out]), tokenizer, seed=1)
    assert source.dropped.by_reason == {"other_ability": 2} and source.dropped.num_rows == 3
    assert [prompt.ability for prompt in (*source.take(0, 2), *source.evaluation(9))] == ["math"] * 3
    unknown = FileData(train=[mixed], abilities=["physics"])
    with pytest.raises(DataError, match=r"no prompt is left of 3: .* 3 of an ability that is not in data\.abilities"):
        build_prompt_source(unknown, tokenizer, seed=1)


def test_a_missing_or_refusing_chat_template_is_explained(tmp_path, tokenizer):
    path = _write(tmp_path / "t.jsonl", [LAYOUTS["gsm8k"]])
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        with pytest.raises(DataError, match=r"data\.template: raw"):
            build_prompt_source(FileData(train=[path]), tokenizer, seed=1)
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(DataError, match="no system role"):
            build_prompt_source(FileData(train=[path]), tokenizer, seed=1)
    finally:
        tokenizer.chat_template = original


@pytest.mark.parametrize(
    "row",
    [
        {"text": "hello"},
        {"question": 5, "answer": "6"},
        {"problem": "p"},
        {"problem": "p", "answer": ["a", 1]},
        EURUS | {"reward_model": {"style": "rule"}},
        EURUS | {"prompt": 5},
        [{"from": "human", "value": "p"}],
        EURUS | {"prompt": [{"role": "user"}]},
        [1, 2],
    ],
)
def test_a_malformed_row_is_named(tmp_path, tokenizer, row):
    path = _write(tmp_path / "bad.jsonl", [LAYOUTS["gsm8k"], row])
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1: .*expected"):
        build_prompt_source(FileData(train=[path]), tokenizer, seed=1)


def test_an_empty_question_is_named(tmp_path, tokenizer):
    path = _write(tmp_path / "bad.jsonl", [LAYOUTS["gsm8k"], LAYOUTS["gsm8k"] | {"question": " "}])
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1: the question is empty; remove the row"):
        build_prompt_source(FileData(train=[path]), tokenizer, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": ', "a.jsonl, line 1: not JSON"),
        ("a.json", "nope", "a.json: not JSON"),
        ("a.json", "5", "a.json: expected a list of rows"),
        ("a.parquet", "nope", "a.parquet: not a Parquet file"),
        ("a.csv", "q,a", "unknown kind of file"),
        ("hf:name", None, "hf:NAME"),
        ("absent.jsonl", None, "no such file"),
    ],
)
def test_unreadable_sources_are_named(tmp_path, tokenizer, name, content, message):
    source = name
    if content is not None:
        (tmp_path / name).write_text(content)
        source = str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        build_prompt_source(FileData(train=[source]), tokenizer, seed=1)


def test_evaluation_needs_files(tmp_path, tokenizer):
    path = _write(tmp_path / "t.jsonl", [LAYOUTS["gsm8k"]])
    with pytest.raises(DataError, match=r"data\.evaluation"):
        build_prompt_source(FileData(train=[path]), tokenizer, seed=1).evaluation(4)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A 1"}]},
        {"prompt": "Q", "response": "A 1"},
        {"prompt": [{"role": "user", "content": "Q"}], "response": "A 1"},
        {"question": "Q", "answer": "A 1"},
        {"problem": "Q", "solution": "A 1", "answer": "1"},
    ],
)
def test_sft_layouts(tmp_path, tokenizer, row):
    config = FileData(train=[_write(tmp_path / "s.jsonl", [row])], system_prompt="none", task_suffix=False)
    source = build_sft_source(config, tokenizer, seed=1)
    example = source.take(0, 1)[0]
    assert tokenizer.decode(list(example.prompt_token_ids)) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(list(example.response_token_ids)) == "A 1<|im_end|>"
    assert example.response_token_ids[-1] == tokenizer.eos_token_id


def test_sft_length_limits_order_and_errors(tmp_path, tokenizer):
    rows = [{"prompt": "p" * n, "response": "r" * m} for n, m in ((1, 1), (50, 1), (1, 50), (2, 2), (3, 9))]
    config = FileData(
        train=[_write(tmp_path / "s.jsonl", rows)],
        template="raw",
        system_prompt="none",
        task_suffix=False,
        max_prompt_tokens=20,
        max_response_tokens=10,
    )
    source = build_sft_source(config, tokenizer, seed=1)
    assert len(source) == 3 and source.dropped.by_reason == {"too_long": 1, "response_too_long": 1}
    whole = source.take(0, 12)
    assert sorted(len(e.response_token_ids) for e in whole[:3]) == [2, 3, 10]
    assert build_sft_source(config, tokenizer, seed=1).take(4, 5) == whole[4:9]
    bad = _write(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "Q"}]}])
    with pytest.raises(DataError, match=r"bad\.jsonl, row 0"):
        build_sft_source(FileData(train=[bad]), tokenizer, seed=1)
