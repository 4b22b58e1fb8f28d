"""bfloat16 models: as exact as transformers' own, and trained through float32 master weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity_rows import TEMPERATURE, expected_logprobs, make_rows
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import MicroBatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_prime.mcore.packing import TokenRows
from megatron_prime.mcore.parallel import Layout, parallel_layout
from megatron_prime.mcore.prime_roles import SftRole
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

FAMILIES = ("qwen2", "qwen3", "llama31")
LEARNING_RATE = 1e-3
NUM_STEPS = 8
SMALLEST_STEP_SEEN = 2.0**-9
"""A change of less than this leaves a bfloat16 number of at least 0.5 as it is."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bf16")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


def setup_of(folder: Path, parallel: ParallelSection, layout: Layout) -> RoleSetup:
    return RoleSetup(
        architecture=read_architecture(folder),
        model=ModelSection(path=str(folder), dtype="bfloat16", make_vocab_size_divisible_by=16),
        parallel=parallel,
        micro_batch=MicroBatchSection(micro_batch_tokens=50),
        layout=layout,
    )


def score(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    parallel = ParallelSection(world_size=2, tensor_model_parallel_size=2)
    scores = {}
    with parallel_layout(parallel, seed=1) as layout:
        for family, folder in folders.items():
            role = ModelRole(setup_of(folder, parallel, layout))
            role.load_hf(HfFolder(folder))
            assert {weight.dtype for weight in role.local_weights().values()} == {torch.bfloat16}
            scores[family] = role.logprobs(make_rows(), temperature=TEMPERATURE)
    return scores


def transformers_bf16(folder: Path, rows: TokenRows) -> torch.Tensor:
    """The log-probs of transformers' bfloat16 model, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    result = torch.zeros(rows.mask.shape, dtype=torch.float64)
    for row, prompt in enumerate(rows.prompt_token_ids):
        response = rows.response_ids[row][rows.mask[row]]
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0].double() / TEMPERATURE
        result[row, : len(response)] = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
    return result


def test_logprobs_are_as_exact_as_transformers(gloo_pool, folders) -> None:
    rows = make_rows()
    for scores in gloo_pool.run(2, score, folders):
        for family, found in scores.items():
            exact = expected_logprobs(folders[family], rows)
            errors, theirs = (
                (values - exact).abs()[rows.mask] for values in (found, transformers_bf16(folders[family], rows))
            )
            # Rounding to 8 bits in every layer: neither is better than the other by more than chance.
            assert errors.mean() < 1.5 * theirs.mean(), family
            assert errors.max() < 2 * theirs.max() < 0.6, family


def examples() -> list[SftExample]:
    generator = torch.Generator().manual_seed(4)
    return [
        SftExample(
            prompt_token_ids=tuple(torch.randint(2, 131, (5,), generator=generator).tolist()),
            response_token_ids=tuple(torch.randint(2, 131, (7,), generator=generator).tolist()),
        )
        for _ in range(6)
    ]


def train(
    folder: Path, tensor: int, distributed_optimizer: bool
) -> tuple[list[float], list[torch.Tensor], set[torch.dtype], set[torch.dtype]]:
    """Losses, the final norm at the start and after every step, the types of weights and of what Adam updates."""
    parallel = ParallelSection(
        world_size=2, tensor_model_parallel_size=tensor, use_distributed_optimizer=distributed_optimizer
    )
    with parallel_layout(parallel, seed=1) as layout:
        role = SftRole(
            setup_of(folder, parallel, layout), OptimizerSection(lr=LEARNING_RATE), num_optimizer_steps=NUM_STEPS
        )
        role.load_hf(HfFolder(folder))
        weights = role.local_weights()
        norm = weights["decoder.final_layernorm.weight"]
        losses, norms = [], [norm.float().clone()]
        for _ in range(NUM_STEPS):
            losses.append(role.update(examples())["loss"])
            norms.append(norm.float().clone())
        masters = {parameter.dtype for group in role.optimizer.param_groups for parameter in group["params"]}
        return losses, norms, {weight.dtype for weight in weights.values()}, masters


@pytest.mark.parametrize(("tensor", "distributed_optimizer"), [(2, False), (1, True), (1, False)])
def test_steps_too_small_for_bfloat16_add_up(gloo_pool, folders, tensor: int, distributed_optimizer: bool) -> None:
    for losses, norms, stored, masters in gloo_pool.run(2, train, folders["llama31"], tensor, distributed_optimizer):
        assert stored == {torch.bfloat16}
        assert masters == {torch.float32}
        assert losses[1] < losses[0]
        assert losses[-1] < losses[1]
        # Adam's first step moves every weight by the learning rate, which these cannot hold.
        coarse = norms[0] >= 0.5
        assert LEARNING_RATE < SMALLEST_STEP_SEEN and coarse.sum() > 50
        assert torch.equal(norms[1][coarse], norms[0][coarse])
        moved = (norms[-1] != norms[0])[coarse].float().mean()
        assert moved > 0.3
