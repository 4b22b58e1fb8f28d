"""Tokenizers from local Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from megatron_prime.errors import DataError

_PROBE = "Janet's ducks lay 16 eggs per day:  16-3=13.\n\\boxed{13} ½"
_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder, from local files only and without running code of the folder.

    Args:
        folder: Hugging Face model folder with `tokenizer.json`, a sentencepiece `tokenizer.model` (Llama 2),
            or `vocab.json` and `merges.txt`.

    Returns:
        The tokenizer.

    Raises:
        DataError: the folder or its files are missing or unreadable.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; model.path must be a Hugging Face model folder")
    if not any(all((path / name).is_file() for name in names) for names in _VOCABULARIES):
        raise DataError(f"{path}: no tokenizer; expected tokenizer.json, tokenizer.model, or vocab.json + merges.txt")
    sentencepiece_only = (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()
    try:
        if sentencepiece_only and not (path / "tokenizer_config.json").is_file():
            # Without a class name transformers falls back to one that knows neither prefix space nor start token.
            tokenizer = LlamaTokenizer.from_pretrained(path, local_files_only=True, add_bos_token=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The loaders raise whatever their parsers raise, down to pyo3's bare Exception.
        raise DataError(f"{path}: the tokenizer cannot be loaded: {error}") from error
    if sentencepiece_only:
        _check_conversion(path / "tokenizer.model", tokenizer)
    return tokenizer


def _check_conversion(model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that transformers converted to something else than the sentencepiece model says."""
    from sentencepiece import SentencePieceProcessor

    expected = SentencePieceProcessor(model_file=str(model)).encode(_PROBE)
    found = list(encode(tokenizer, [_PROBE], special_tokens=False)[0])
    if found != expected:
        raise DataError(
            f"{model}: transformers converts this tokenizer to one that splits text differently; "
            "set tokenizer_class in tokenizer_config.json or add a tokenizer.json"
        )


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> tuple[int, ...]:
    """The tokens that end an answer.

    Args:
        tokenizer: from `load_tokenizer`.
        folder: its model folder; `generation_config.json` may name further end tokens.

    Returns:
        Distinct ids, the tokenizer's own first.

    Raises:
        DataError: neither names one, or `generation_config.json` is damaged.
    """
    ids = [] if tokenizer.eos_token_id is None else [eos_token_id(tokenizer)]
    path = Path(folder) / "generation_config.json"
    if path.is_file():
        ids += _ids_of(path)
    if not ids:
        raise DataError(f"{folder}: no end token; set eos_token in tokenizer_config.json or {path.name}")
    return tuple(dict.fromkeys(ids))


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a supervised answer.

    Raises:
        DataError: the tokenizer names none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("model.path: the tokenizer has no end token; set eos_token in tokenizer_config.json")
    return tokenizer.eos_token_id


def _ids_of(path: Path) -> list[int]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) for item in values):
        raise DataError(f"{path}: eos_token_id must be a token id or a list of them, found {value!r}")
    return values


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool) -> list[tuple[int, ...]]:
    """Token ids of several texts.

    Args:
        tokenizer: from `load_tokenizer`.
        texts: any number of texts.
        special_tokens: whether to add what the tokenizer puts around a text (a start token, for example).

    Returns:
        One tuple of ids per text.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return [tuple(ids) for ids in encoded]  # pyright: ignore
