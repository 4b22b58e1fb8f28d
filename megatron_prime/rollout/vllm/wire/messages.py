"""What trainer and engine process say to each other, pickled over a socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.wire.ipc import BucketOffer
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan

BACKENDS = {
    "shared_memory": "megatron_prime_shared_memory",
    "ipc": "megatron_prime_ipc",
    "servers": "megatron_prime_broadcast",
}
"""What the classes of `transfer` are called in vLLM's factory."""
PLAIN = "MEGATRON_PRIME_VLLM_PLAIN"
"""1 in the environment of vLLM's workers that are not to repack matrices on a CPU; set when an engine is built."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What one vLLM engine is built from."""

    folder: str
    """Hugging Face folder; only its config.json is read, weights come by `LoadWeights`."""
    dtype: str
    section: VllmSection
    max_model_len: int
    """What `section.max_model_len` stands for."""
    transfer: Literal["shared_memory", "ipc"]
    """What `section.transfer` stands for where the engine is on the trainer's host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedUpdate:
    """A complete set of weights in shared memory, perhaps still being written."""

    path: str
    plan: SharedPlan
    compare_digests: bool
    """Whether the trainer's checksums of its shards are compared with what arrived."""
    timeout_seconds: float
    """The longest wait for the trainer to write on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketUpdate:
    """A complete set of weights that comes in buckets."""

    offer: BucketOffer
    first_bucket: int
    """Buckets of earlier sets."""
    plan: SharedPlan
    compare_digests: bool
    timeout_seconds: float
    """The longest wait for a bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadWeights:
    """Replace all weights."""

    update: SharedUpdate | BucketUpdate
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One answer to sample."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Sample these answers; each is sent back as soon as it is finished."""

    requests: tuple[EngineRequest, ...]
    abort_after_seconds: float | None = None
    """When to cut off what is not finished; None: never."""
    progress_seconds: float = 5.0
    """How often to say, at the most, that tokens are being sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """There is a process, which is going to build the engine."""

    process_id: int
    """Also of its process group: the engine's workers are in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The engine is built and has no weights yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The engine holds these weights and nothing else."""

    version: int
    num_probed_columns: int
    """Columns of each repacked matrix that were read back and compared bit for bit; 0: matrices are not repacked
    and were compared as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Tokens have been sampled since the last message, and there will be an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """One answer."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: tuple[int, ...]
    """Of its tokens, in order; more than one if weights changed meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The engine cannot go on and ends; the text is for the user."""

    text: str


Message = LoadWeights | Generate
Reply = Started | Ready | Loaded | Progress | Finished | Failed
