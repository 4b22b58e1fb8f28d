"""Writes the model folder of the arithmetic task (shape and character tokenizer, no weights)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_prime.data.arithmetic import SYMBOLS

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CONTEXT_TOKENS = 256


def make_tokenizer() -> Tokenizer:
    """One token per character; decoding gives the text back exactly.

    Built as a Qwen2 tokenizer without merges (byte-level), because transformers rebuilds the tokenizer of a Qwen2
    model from its vocabulary and ignores any other construction in `tokenizer.json`.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [byte_level.pre_tokenize_str(symbol)[0][0] for symbol in sorted(set(SYMBOLS))]
    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIAL_TOKENS, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def make_configs(vocab_size: int) -> dict[str, dict[str, object]]:
    """The JSON files beside the tokenizer, by file name."""
    pad_id, eos_id = SPECIAL_TOKENS.index("<pad>"), SPECIAL_TOKENS.index("<eos>")
    return {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT_TOKENS,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
            "torch_dtype": "float32",
        },
        "generation_config.json": {"eos_token_id": eos_id, "pad_token_id": pad_id, "do_sample": True},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": CONTEXT_TOKENS,
            "clean_up_tokenization_spaces": False,
        },
    }


def write_model_folder(folder: Path) -> None:
    """Writes all files of the folder, creating it where needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in make_configs(tokenizer.get_vocab_size()).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("configs/models/arithmetic"))
    write_model_folder(parser.parse_args().output)


if __name__ == "__main__":
    main()
