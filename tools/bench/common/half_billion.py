"""Models of Qwen2.5-0.5B's shape with random weights, for the benches.

Importing this imports no library: some benches measure what those take.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.measuring import ROOT

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TINY_CONFIG = CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
"""The same family for tiny runs, with heads of 32 channels, which vLLM's attention on CPUs takes."""


def write_folder(folder: Path, config: Mapping[str, Any] = CONFIG) -> int:
    """A model in bfloat16 and nothing to train it with; returns its bytes of weights."""
    import torch
    from safetensors.torch import save_file

    from megatron_prime.weights.architecture import read_architecture
    from megatron_prime.weights.hf_folder import expected_shapes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = expected_shapes(read_architecture(folder))
    tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def make_trainable(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """A freshly initialized model with the arithmetic tokenizer, made once; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        qwen = Qwen2Config(**{**config, "eos_token_id": 1, "pad_token_id": 0})
        AutoModelForCausalLM.from_config(qwen, dtype=torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "configs" / "models" / "arithmetic" / file, folder)
    return folder
