"""What can be said about an evaluation on benchmarks; loads nothing, as the command line needs it at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """What the command line says; None means the benchmark's own protocol."""

    model: str
    """Hugging Face folder with tokenizer, or a Megatron checkpoint of `convert`."""
    benchmarks: tuple[str, ...]
    data: str = "data"
    """Folder with one folder per benchmark."""
    output: str
    """Folder for answers and results; where it has some, the evaluation goes on."""
    engine: str = "transformers"
    tensor_parallel_size: int = 1
    """Of a vLLM engine."""
    dtype: str = "float32"
    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    num_problems: int | None = None
    """The first ones only, for a try."""
    system_prompt: Literal["prime", "none"] = "prime"
    template: Literal["chat", "raw"] = "chat"
    seed: int = 1
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that grade."""
