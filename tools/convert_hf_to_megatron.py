"""Converts a Hugging Face folder to a Megatron distributed checkpoint.

The same as `megatron-prime convert to-megatron`, with its options (--help):

    python tools/convert_hf_to_megatron.py models/Qwen2.5-7B megatron/qwen2.5-7b --tensor-model-parallel-size 4 --verify
"""

from __future__ import annotations

import sys

from megatron_prime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
