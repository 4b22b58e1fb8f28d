"""Tokenizers from local folders."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_prime.data.tokenizer import encode, end_token_ids, load_tokenizer
from megatron_prime.errors import DataError

GSM8K = Path(__file__).parents[2] / "data" / "gsm8k"
ARITHMETIC = Path(__file__).parents[3] / "configs" / "models" / "arithmetic"


def _texts():
    return [json.loads(line)["answer"] for line in (GSM8K / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sentencepiece_model():
    buffer = io.BytesIO()
    # The options of Llama 2: byte fallback, digits apart, no normalisation.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts()),
        model_writer=buffer,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return buffer.getvalue()


@pytest.fixture(params=["with tokenizer_config.json", "config.json alone", "tokenizer.model alone"])
def llama_folder(request, tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    if request.param != "tokenizer.model alone":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500}))
    if request.param == "with tokenizer_config.json":
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_sentencepiece_model_gives_its_own_tokens(llama_folder):
    tokenizer = load_tokenizer(llama_folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    texts = [*_texts(), "a  b", "½ 数", "17+5=22\n\n;", "\\boxed{19}"]
    with_start = encode(tokenizer, texts, special_tokens=True)
    for text, ids in zip(texts, with_start, strict=True):
        assert list(ids) == [processor.bos_id(), *processor.encode(text)]
        assert tokenizer.decode(list(ids), skip_special_tokens=True) == text
    assert end_token_ids(tokenizer, llama_folder) == (processor.eos_id(),)


def test_a_converted_tokenizer_that_splits_differently_is_refused(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(DataError, match="splits text differently"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"), [({"eos_token_id": 5}, (1, 5)), ({"eos_token_id": [1, 7, 8]}, (1, 7, 8)), ({}, (1,))]
)
def test_end_tokens_of_tokenizer_and_generation_config(tmp_path, content, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert end_token_ids(load_tokenizer(ARITHMETIC), tmp_path) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}'])
def test_a_damaged_generation_config_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json"):
        end_token_ids(load_tokenizer(ARITHMETIC), tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
