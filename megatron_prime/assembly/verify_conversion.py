"""The proof that a conversion has changed nothing: every bit, and log-probs of a few prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.data.tokenizer import encode, load_tokenizer
from megatron_prime.errors import CheckpointError, DataError
from megatron_prime.mcore.checkpoint.state import load_weights
from megatron_prime.mcore.cpu import on_megatron_platform
from megatron_prime.mcore.dtypes import DTYPES
from megatron_prime.mcore.packing import TokenRows
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.conversion import hf_tensors
from megatron_prime.weights.conversion_plan import hf_sizes
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.megatron_folder import MegatronFolder

logger = logging.getLogger(__name__)

_PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many in all?",
    "Let $f(x) = x^2 - 3x + 2$. Find all real roots of $f$.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
)
_NUM_IDS = 24
"""Tokens of a prompt made up where there is no tokenizer."""
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference of a log-prob: two programs sum in different orders, over all layers."""


def verify_bits(hf: Path, megatron: Path, show: Callable[[int, int], None]) -> str:
    """Compares every tensor of a Megatron checkpoint with a Hugging Face folder's, bit by bit.

    Where the two are stored in different types, the wider one is rounded to the narrower first.

    Raises:
        CheckpointError: a tensor differs; names the first.
    """
    architecture, folder = read_architecture(hf), HfFolder(hf)
    folder.validate(architecture)
    stored = MegatronFolder(megatron)
    stored.validate(weight_specs(architecture), architecture)
    sizes = hf_sizes(architecture, torch.uint8)
    done, num_tensors = 0, 0
    for name, tensor in hf_tensors(stored, architecture):
        wanted = folder.fetch(name, tuple(slice(0, size) for size in tensor.shape))
        narrow = min((tensor.dtype, wanted.dtype), key=lambda dtype: dtype.itemsize)
        bits = torch.int16 if narrow.itemsize == 2 else torch.int32
        if not torch.equal(tensor.to(narrow).view(bits), wanted.to(narrow).view(bits)):
            raise CheckpointError(f"{megatron}: {name} is not what {hf} has; convert again, and suspect the disk")
        del wanted
        folder.release()
        done, num_tensors = done + sizes[name], num_tensors + 1
        show(done, sum(sizes.values()))
    return f"verified: {num_tensors} tensors are equal bit by bit"


def verify_logprobs(hf: Path, megatron: Path) -> str:
    """Compares log-probs of a few prompts: the checkpoint in Megatron's model, the folder in transformers'.

    Both models are in memory, one after the other.

    Raises:
        CheckpointError: a log-prob differs by more than rounding explains.
    """
    architecture = read_architecture(hf)
    dtype = next(iter(MegatronFolder(megatron).dtypes))
    prompts = _prompts(hf, architecture)
    expected = _transformers_logprobs(hf, dtype, prompts)
    found = _megatron_logprobs(hf, megatron, dtype, architecture, prompts)
    gap = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    if not gap <= _TOLERANCES[dtype]:
        raise CheckpointError(
            f"{megatron}: a log-prob differs by {gap:.2g} from transformers', more than {_TOLERANCES[dtype]};"
            f" {hf}/config.json asks for something that the Megatron model does not do"
        )
    num_tokens = sum(len(ids) - 1 for ids in prompts)
    return f"verified: log-probs of {num_tokens} tokens differ by at most {gap:.2g} from transformers'"


def _prompts(hf: Path, architecture: ModelArchitecture) -> list[tuple[int, ...]]:
    try:
        return encode(load_tokenizer(hf), _PROMPTS, special_tokens=True)
    except DataError as error:
        logger.info("%s; comparing log-probs of made-up token ids", error)
    seeded = torch.Generator().manual_seed(1)
    made_up = torch.randint(architecture.vocab_size, (len(_PROMPTS), _NUM_IDS), generator=seeded)
    return [tuple(ids) for ids in made_up.tolist()]


def _transformers_logprobs(hf: Path, dtype: torch.dtype, prompts: list[tuple[int, ...]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype, local_files_only=True)
    results = []
    for ids in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        results.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return results


@on_megatron_platform
def _megatron_logprobs(
    hf: Path, megatron: Path, dtype: torch.dtype, architecture: ModelArchitecture, prompts: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    name = next(name for name, known in DTYPES.items() if known is dtype)
    parallel = ParallelSection()
    with parallel_layout(parallel, seed=1) as layout:
        role = ModelRole(
            RoleSetup(
                architecture=architecture,
                model=ModelSection(path=str(hf), dtype=name),  # type: ignore[arg-type]
                parallel=parallel,
                micro_batch=MicroBatchSection(micro_batch_size=1),
                layout=layout,
            )
        )
        load_weights(role.chunks, megatron)
        examples = [SftExample(prompt_token_ids=ids[:1], response_token_ids=ids[1:]) for ids in prompts]
        scores = role.logprobs(TokenRows.from_examples(examples))
    return [scores[row, : len(ids) - 1] for row, ids in enumerate(prompts)]
