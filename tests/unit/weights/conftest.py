"""Model folders made by transformers: the real configurations' proportions, shrunk."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from written_folders import export

_SIZES = {"num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 101, "max_position_embeddings": 256}
_LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_GQA = {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}

CONFIGS: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "qwen2-tied": (transformers.Qwen2Config, {**_GQA, **_QWEN_ROPE, "tie_word_embeddings": True}),
    "qwen2-untied": (transformers.Qwen2Config, {**_GQA, **_QWEN_ROPE, "tie_word_embeddings": False}),
    "qwen3-tied": (transformers.Qwen3Config, {**_GQA, **_QWEN_ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": (transformers.Qwen3Config, {**_GQA, **_QWEN_ROPE, "head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {**_GQA, **_QWEN_ROPE, **_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen2-moe": (
        transformers.Qwen2MoeConfig,
        {**_GQA, **_QWEN_ROPE, **_EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "llama2": (transformers.LlamaConfig, {"hidden_size": 32, "num_attention_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3-tied": (transformers.LlamaConfig, {**_GQA, **_LLAMA3_ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "llama3-untied": (transformers.LlamaConfig, {**_GQA, **_LLAMA3_ROPE, "tie_word_embeddings": False}),
}


def _make_folder(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    config_class, settings = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**_SIZES, **settings))
    for parameter in model.parameters():  # norms and biases start as constants, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder with config, weights and a tokenizer; tests copy before they change anything."""
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        _make_folder(root / name, name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(params=list(CONFIGS))
def model_folder(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Path:
    """Each folder in turn."""
    return model_folders[request.param]


@pytest.fixture
def folder(tmp_path: Path, model_folders: dict[str, Path]) -> Path:
    """A private copy of an untied Qwen2 model in one file."""
    return shutil.copytree(model_folders["qwen2-untied"], tmp_path / "model")


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in several files."""
    export(folder, folder.with_name("sharded"), max_shard_bytes=20_000)
    return folder.with_name("sharded")
