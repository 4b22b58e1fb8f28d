"""Megatron's log-probs equal transformers' at every layout, and weights survive every layout bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_rows import TEMPERATURE, expected_logprobs, make_rows
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import MicroBatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_prime.kernels import HeadOptions
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


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
                    micro_batch=MicroBatchSection(packed=packed, micro_batch_tokens=50),
                    head=HeadOptions(workspace_bytes=4096),
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


def response_logits(role: ModelRole, rows: TokenRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Rows, columns and logits [n, vocabulary] of this rank, from the states before the head; last stage only."""
    states: list[torch.Tensor] = []
    if role.chunks[0].post_process:
        norm: Any = role.chunks[0].decoder.final_layernorm
        norm.register_forward_hook(lambda *call: states.append(call[-1]))
    role.logprobs(rows)
    if not states:
        return None

    def gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(role.layout.tp_size)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous(), group=role.layout.tp_group)
        return torch.cat(parts, dim=dim)

    tied = role.chunks[0].share_embeddings_and_output_weights
    head: Any = role.chunks[0].shared_embedding_or_output_weight() if tied else role.chunks[0].output_layer.weight
    hidden = gather(states[0], 0) if role.chunks[0].config.sequence_parallel else states[0]
    (micro_batch,) = role._micro_batches(rows, range(len(rows.mask)))
    selected = hidden.transpose(0, 1)[micro_batch.predicts]
    logits = gather(selected @ head.T, 1)[:, : role.architecture.vocab_size]
    return micro_batch.rows, micro_batch.columns, logits.detach()


def all_logits(
    folders: dict[str, Path], sizes: tuple[int, int, int], sequence_parallel: bool, packed: bool
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
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
            setup = RoleSetup(
                architecture=read_architecture(folder),
                model=ModelSection(path=str(folder), make_vocab_size_divisible_by=16),
                parallel=parallel,
                micro_batch=MicroBatchSection(packed=packed, micro_batch_size=7, micro_batch_tokens=1000),
                layout=layout,
            )
            role = ModelRole(setup)
            role.load_hf(HfFolder(folder))
            results[family] = response_logits(role, make_rows())
    return results


def expected_logits(folder: Path, rows: TokenRows) -> dict[tuple[int, int], torch.Tensor]:
    """Per row and column of the responses, row by row through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = {}
    for row, prompt in enumerate(rows.prompt_token_ids):
        response = rows.response_ids[row][rows.mask[row]]
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0]
        result |= {(row, column): logits[len(prompt) - 1 + column] for column in range(len(response))}
    return result


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "tp2_sp"])
def test_logits(gloo_pool, folders, layout: str, packed: bool) -> None:
    sizes = LAYOUTS[layout.removesuffix("_sp")]
    ranks = gloo_pool.run(sizes[2], all_logits, folders, sizes, layout.endswith("_sp"), packed)
    for family, folder in folders.items():
        expected = expected_logits(folder, make_rows())
        seen = set()
        for found in filter(None, (results[family] for results in ranks)):
            for row, column, logits in zip(found[0].tolist(), found[1].tolist(), found[2], strict=True):
                assert (logits - expected[row, column]).abs().max() < 1e-4, (family, row, column)
                seen.add((row, column))
        assert seen == expected.keys(), family


PROMPT = tuple(range(2, 15))
ANSWERS = tuple(range(0, 131, 6))


def mean_entropy(folders: dict[str, Path], tensor: int) -> dict[str, float]:
    """What a training step reports for the token after the prompt."""
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
            role = SftRole(setup, OptimizerSection(lr=1e-12), num_optimizer_steps=1)
            role.load_hf(HfFolder(folder))
            examples = [SftExample(prompt_token_ids=PROMPT, response_token_ids=(token,)) for token in ANSWERS]
            results[family] = role.update(examples)["entropy"]
    return results


@pytest.mark.parametrize("tensor", [1, 2])
def test_entropy(gloo_pool, folders, tensor: int) -> None:
    for results in gloo_pool.run(tensor, mean_entropy, folders, tensor):
        for family, entropy in results.items():
            model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
            with torch.no_grad():
                logits = model(torch.tensor([PROMPT])).logits[0, -1].double()
            assert entropy == pytest.approx(float(torch.special.entr(logits.softmax(-1)).sum()), abs=1e-4), family
