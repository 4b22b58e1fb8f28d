"""Small models of every family with heads that vLLM's CPU attention takes, and their log-probs by transformers."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench.common.engine_setup import engine_setup
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.config.schema import VllmSection
from megatron_prime.mcore.dtypes import DTYPES
from megatron_prime.rollout.vllm.engines import engine_beside
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.process import EngineParent
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder

FAMILIES = {
    "qwen2_tied": ("qwen2", True),
    "qwen2_untied": ("qwen2", False),
    "qwen3_tied": ("qwen3", True),
    "llama_untied": ("llama", False),
}
VOCAB_SIZE = 131
ARITHMETIC = Path(__file__).resolve().parents[2] / "configs" / "models" / "arithmetic"


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def save_model(family: str, folder: Path, seed: int = 0, **changes: object) -> Path:
    """Writes a random model; biases and norms are random too, so that no mix-up can hide."""
    kind, tied = FAMILIES[family]
    shape = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, tie_word_embeddings=tied, **(shape | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def make_start(family: str, folder: Path, *, seed: int = 0, vocab_size: int = 27, **changes: object) -> Path:
    """A random model with the arithmetic task's tokenizer."""
    tokens = {"vocab_size": vocab_size, "eos_token_id": 1, "pad_token_id": 0}
    save_model(family, folder, seed, max_position_embeddings=512, **tokens, **changes)
    for path in ARITHMETIC.iterdir():
        if "token" in path.name or path.name == "chat_template.jinja":
            shutil.copy(path, folder)
    return folder


def export(folder: Path, dtype: str = "float32") -> FolderExport:
    """A folder's weights as an engine takes them."""
    return FolderExport(HfFolder(folder), read_architecture(folder), DTYPES[dtype])


def make_engine(
    folder: Path, parent: EngineParent | None = None, dtype: str = "float32", **changes: object
) -> VllmBeside:
    """An engine in a process beside this one, without weights."""
    section = replace(VllmSection(kv_cache_gib=0.0625, max_num_seqs=64, timeout_seconds=120.0), **changes)  # pyright: ignore[reportArgumentType]
    return engine_beside(engine_setup(folder, section, dtype=dtype, end_token_ids=(1,), decode=spell), parent)


def spell(token_ids: Sequence[int]) -> str:
    """Stands in for a tokenizer."""
    return " ".join(map(str, token_ids))


def make_prompts(num_prompts: int, *, length: int = 12) -> list[Prompt]:
    """Random prompts of up to `length` tokens."""
    generator = torch.Generator().manual_seed(num_prompts)
    return [
        Prompt(
            prompt_id=f"p{i}",
            text="",
            token_ids=tuple(torch.randint(2, VOCAB_SIZE, (length - i % 3,), generator=generator).tolist()),
            ground_truth="",
        )
        for i in range(num_prompts)
    ]


def sampling(**changes: object) -> SamplingParams:
    """Four answers per prompt at a temperature that is not 1."""
    options = {"num_responses": 4, "temperature": 0.7, "top_p": 1.0, "max_response_tokens": 24, "seed": 3}
    return SamplingParams(**(options | changes))  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def largest_gap(
    folder: Path, prompts: Sequence[Prompt], answers: Sequence[Sequence[Response]], temperature: float = 0.7
) -> float:
    """Largest |difference| between reported log-probs and those of transformers with the folder's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = 0.0
    for prompt, row in zip(prompts, answers, strict=True):
        for answer in row:
            ids = torch.tensor([prompt.token_ids + answer.token_ids])
            logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
            start = len(prompt.token_ids) - 1
            chosen = logprobs[start:-1].gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            worst = max(worst, float((chosen - torch.tensor(answer.logprobs, dtype=torch.float64)).abs().max()))
    return worst
