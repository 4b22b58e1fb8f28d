"""Converts a Hugging Face folder to a Megatron distributed checkpoint, or back.

The same as `megatron-prime convert`:

    python tools/convert_checkpoint.py to-megatron models/Qwen2.5-7B megatron/qwen2.5-7b
    python tools/convert_checkpoint.py to-hf runs/my/checkpoints/step_00000010/policy exported --like models/Qwen2.5-7B
"""

from __future__ import annotations

import sys

from megatron_prime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
