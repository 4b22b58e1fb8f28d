"""Megatron's log-probs equal transformers' at every layout, and weights survive every layout bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import MicroBatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_prime.mcore.packing import TokenRows
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.prime_roles import SftRole
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

LAYOUTS = {
    "tp1": (1, 1, 1),
    "tp2": (2, 1, 2),
    "pp2": (1, 2, 2),
    "dp2": (1, 1, 2),
    "tp4": (4, 1, 4),
    "tp2_pp2": (2, 2, 4),
}
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


def make_rows() -> TokenRows:
    generator = torch.Generator().manual_seed(3)
    num_rows = 7
    lengths = torch.randint(1, 12, (num_rows,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(2, 131, mask.shape, generator=generator)
    prompts = [
        torch.randint(2, 131, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 20, (num_rows,), generator=generator)
    ]
    return TokenRows(prompt_token_ids=tuple(map(tuple, prompts)), response_ids=ids * mask, mask=mask)


def expected_logprobs(folder: Path, rows: TokenRows) -> torch.Tensor:
    """Row by row through transformers, log-softmax in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = torch.zeros(rows.mask.shape, dtype=torch.float64)
    for row, prompt in enumerate(rows.prompt_token_ids):
        response = rows.response_ids[row][rows.mask[row]]
        sequence = torch.cat((torch.tensor(prompt), response))
        with torch.no_grad():
            logits = model(sequence[None]).logits[0].double() / TEMPERATURE
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])
        result[row, : len(response)] = picked[:, 0]
    return result


def score_and_export(
    folders: dict[str, Path], sizes: tuple[int, int, int], sequence_parallel: bool
) -> dict[str, tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    tensor, pipeline, world_size = sizes
    parallel = ParallelSection(
        world_size=world_size,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
    )
    results = {}
    with parallel_layout(parallel, seed=1) as layout:
        for family, folder in folders.items():
            scores = []
            for packed in (True, False):
                setup = RoleSetup(
                    architecture=read_architecture(folder),
                    model=ModelSection(path=str(folder), make_vocab_size_divisible_by=16),
                    parallel=parallel,
                    micro_batch=MicroBatchSection(packed=packed, micro_batch_tokens=50, logprob_chunk_tokens=16),
                    layout=layout,
                )
                role = ModelRole(setup)
                role.load_hf(HfFolder(folder))
                scores.append(role.logprobs(make_rows(), temperature=TEMPERATURE))
            results[family] = (scores, {name: tensor.clone() for name, tensor in role.export_weights()})
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_weights(gloo_pool, folders, layout: str) -> None:
    sizes = LAYOUTS[layout]
    for results in gloo_pool.run(sizes[2], score_and_export, folders, sizes, False):
        for family, (scores, exported) in results.items():
            expected = expected_logprobs(folders[family], make_rows())
            for score in scores:
                assert (score - expected).abs().max() < 1e-4, family
            saved = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).state_dict()
            tied = {"lm_head.weight"} if family in ("qwen2", "qwen3") else set()
            assert exported.keys() == saved.keys() - tied
            assert all(torch.equal(exported[name], saved[name]) for name in exported), family


def test_sequence_parallel(gloo_pool, folders) -> None:
    for results in gloo_pool.run(2, score_and_export, folders, LAYOUTS["tp2"], True):
        for family, (scores, _) in results.items():
            expected = expected_logprobs(folders[family], make_rows())
            assert all((score - expected).abs().max() < 1e-4 for score in scores), family


PROMPT = tuple(range(2, 15))
CANDIDATES = tuple(range(0, 131, 6))
"""One token each of every part of the vocabulary, so of every tensor-parallel shard."""


def make_candidates() -> TokenRows:
    """The same prompt before each candidate."""
    ids = torch.tensor(CANDIDATES)[:, None]
    return TokenRows(
        prompt_token_ids=(PROMPT,) * len(CANDIDATES), response_ids=ids, mask=torch.ones_like(ids, dtype=torch.bool)
    )


def score_candidates(folders: dict[str, Path], tensor: int) -> dict[str, tuple[torch.Tensor, float]]:
    """Log-probs of the candidates, and the mean entropy that a training step of size 0 reports."""
    parallel = ParallelSection(world_size=tensor, tensor_model_parallel_size=tensor)
    results = {}
    with parallel_layout(parallel, seed=1) as layout:
        for family, folder in folders.items():
            setup = RoleSetup(
                architecture=read_architecture(folder),
                model=ModelSection(path=str(folder), make_vocab_size_divisible_by=16),
                parallel=parallel,
                micro_batch=MicroBatchSection(micro_batch_size=8),
                layout=layout,
            )
            role = SftRole(setup, OptimizerSection(lr=0.0), num_optimizer_steps=1)
            role.load_hf(HfFolder(folder))
            scores = role.logprobs(make_candidates())[:, 0]
            examples = [SftExample(prompt_token_ids=PROMPT, response_token_ids=(token,)) for token in CANDIDATES]
            results[family] = scores, role.update(examples)["entropy"]
    return results


@pytest.mark.parametrize("tensor", [1, 2])
def test_differences_of_logprobs_are_differences_of_logits(gloo_pool, folders, tensor: int) -> None:
    for results in gloo_pool.run(tensor, score_candidates, folders, tensor):
        for family, (scores, entropy) in results.items():
            model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
            with torch.no_grad():
                logits = model(torch.tensor([PROMPT])).logits[0, -1].double()
            picked = logits[list(CANDIDATES)]
            found = scores.double()
            assert picked.std() > 0.5
            assert ((found - found[0]) - (picked - picked[0])).abs().max() < 1e-4, family
            assert entropy == pytest.approx(float(torch.special.entr(logits.softmax(-1)).sum()), abs=1e-4), family
