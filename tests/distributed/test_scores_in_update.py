"""Scores that an update brings along are those of a scoring pass, and the update is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from megatron_prime.batch import RolloutBatch
from megatron_prime.config.schema import (
    MicroBatchSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PolicySection,
    PrmSection,
)
from megatron_prime.kernels import HeadOptions
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.prime_roles import PolicyRole, PrmRole
from megatron_prime.mcore.role import RoleSetup, TrainableRole
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

TEMPERATURE = 0.8
# Adam's first step divides each gradient by itself; a large epsilon keeps the size of the gradient in it.
OPTIMIZER = OptimizerSection(lr=1e-2, adam_eps=1e-2, clip_grad=0.0)
LAYOUTS = {
    "tp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


def make_batch() -> RolloutBatch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 9, 1, 6, 12, 5, 7, 2])
    mask = torch.arange(12) < lengths[:, None]
    return RolloutBatch(
        prompt_token_ids=tuple(tuple(range(2, 5 + i % 3)) for i in range(8)),
        response_ids=torch.randint(2, 131, (8, 12), generator=generator) * mask,
        mask=mask,
        rollout_logprobs=torch.zeros(8, 12),
        outcomes=torch.tensor([1.0, 0.0] * 4),
        group_index=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        weight_versions=torch.zeros(8, dtype=torch.int64),
    )


def update_twice(folder: Path, sizes: dict[str, int]) -> dict[str, list]:
    """Per role: the scores before, those that the update brought, metrics and weights with and without scoring."""
    parallel = ParallelSection(world_size=2, **sizes)
    rollout = make_batch()
    results: dict[str, list] = {}
    with parallel_layout(parallel, seed=1) as layout:
        setup = RoleSetup(
            architecture=read_architecture(folder),
            model=ModelSection(path=str(folder), make_vocab_size_divisible_by=16),
            parallel=parallel,
            micro_batch=MicroBatchSection(micro_batch_tokens=30),
            layout=layout,
            # Eight tokens: some responses fit, others do not.
            head=HeadOptions(workspace_bytes=8 * 80 * 4),
        )
        for name in ("policy", "prm"):
            outcomes = []
            for scored in (True, False):
                role: TrainableRole
                if name == "policy":
                    role = PolicyRole(setup, PolicySection(num_epochs=2, optimizer=OPTIMIZER), num_steps=1)
                else:
                    role = PrmRole(setup, PrmSection(beta=0.5, optimizer=OPTIMIZER), num_steps=1)
                role.load_hf(HfFolder(folder))
                policy = role.score(rollout, temperature=TEMPERATURE) if isinstance(role, PolicyRole) else None
                prm = role.score(rollout) if isinstance(role, PrmRole) else None
                reference = torch.full((8, 12), -5.0) * rollout.mask
                if isinstance(role, PolicyRole):
                    result = role.update(
                        rollout,
                        torch.linspace(-1, 1, 96).view(8, 12),
                        old_logprobs=policy if scored else None,
                        reference_logprobs=reference,
                        temperature=TEMPERATURE,
                        seed=0,
                    )
                else:
                    assert isinstance(role, PrmRole)
                    scores = prm if scored else None
                    result = role.update(rollout, reference_logprobs=reference, prm_logprobs=scores, window=(), seed=0)
                weights = {key: tensor.clone() for key, tensor in role.export_weights()}
                outcomes.append((policy if prm is None else prm, result.logprobs, result.metrics, weights))
            results[name] = outcomes
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2_untied", tmp_path_factory.mktemp("model") / "untied")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_scores_as_a_scoring_pass_does(gloo_pool, folder: Path, layout: str) -> None:
    for results in gloo_pool.run(2, update_twice, folder, LAYOUTS[layout]):
        for (scores, given, metrics, weights), (_, brought, same_metrics, same_weights) in results.values():
            assert given is scores or torch.equal(given, scores)
            assert (brought - scores).abs().max() < 1e-5
            assert brought[~make_batch().mask].eq(0).all()
            assert metrics["grad_norm"] > 1e-2
            assert same_metrics == pytest.approx(metrics, abs=1e-5, rel=1e-5)
            for key, tensor in weights.items():
                assert (tensor - same_weights[key]).abs().max() < 1e-5, key
