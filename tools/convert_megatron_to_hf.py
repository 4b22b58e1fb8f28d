"""Converts a Megatron distributed checkpoint to a Hugging Face folder.

The same as `megatron-prime convert to-hf`, with its options (--help):

    python tools/convert_megatron_to_hf.py runs/my/checkpoints/step_00000010/policy exported --like models/Qwen2.5-7B
"""

from __future__ import annotations

import sys

from megatron_prime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
