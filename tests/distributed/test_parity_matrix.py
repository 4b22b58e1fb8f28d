"""Three PRIME steps at every layout do what a slow float64 loop does: log-probs, losses, gradient norms, weights.

`make test-distributed` runs the whole matrix of layouts; the suite a part of it that has every feature beside others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from slow_prime import ADVANTAGE, NUM_STEPS, POLICY, PRM, TEMPERATURE, Trace, make_batch, slow_prime
from tiny_models import save_tiny_model

from megatron_prime.algorithm.advantage import compute_advantages
from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.kernels import HeadOptions
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.prime_roles import PolicyRole, PrmRole, ReferenceRole
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

# Of float32 against float64 over nine optimizer steps: log-probs and weights absolutely, losses (below 1) and gradient
# norms (some 20) by their size.
LOGPROB_BOUND, NUMBER_BOUND, WEIGHT_BOUND = 5e-5, 2e-5, 2e-5
MAX_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and how its batches are cut."""

    family: str = "qwen2"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    """Of the ranks of a pipeline stage."""
    sequence_parallel: bool = False
    packed: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    distributed_optimizer: bool = False
    overlap: bool = False
    """Communication beside computation, as far as the other settings allow."""
    virtual: int | None = None

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name in ("tp", "pp", "cp", "dp", "ep") if (size := getattr(self, name)) > 1]
        switches = ["sp"] * self.sequence_parallel + ["padded"] * (not self.packed)
        switches += [self.recompute] * (self.recompute != "none") + ["sharded_adam"] * self.distributed_optimizer
        switches += ["overlap"] * self.overlap + ["interleaved"] * (self.virtual is not None)
        return "_".join([self.family, *sizes, *switches])


FEW = [
    Case(),
    Case(family="qwen3", tp=2, cp=2, sequence_parallel=True, recompute="selective"),
    Case(family="llama", pp=2, cp=2, packed=False, recompute="full"),
    Case(family="qwen2", tp=2, pp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True),
    Case(family="qwen2_untied", cp=2, dp=2, distributed_optimizer=True, overlap=True),
    Case(family="qwen2", pp=2, dp=2, virtual=2, overlap=True),
    Case(family="qwen3_moe", tp=2, ep=2, sequence_parallel=True),
    Case(family="qwen2_moe", pp=2, dp=2, ep=2, packed=False, recompute="full"),
]


def every_case() -> Iterator[Case]:
    """All sizes up to eight ranks, each packed and padded, with and without sequence parallelism; the switches that
    depend on nothing else take turns."""
    sizes = itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2))
    families = itertools.cycle(("qwen2", "qwen3", "llama", "qwen2_untied"))
    recomputes = itertools.cycle(("none", "full", "selective"))
    sharded = itertools.cycle((False, True))
    # Seven and five have no divisor in common with the others, so that all combinations come up.
    overlaps = itertools.cycle((False, True, False, True, True, False, True))
    virtuals = itertools.cycle((None, 2, None, 2, 2))
    for tp, pp, cp, dp in sizes:
        if tp * pp * cp * dp > MAX_RANKS:
            continue
        for sequence_parallel, packed in itertools.product((False, True)[: min(tp, 2)], (True, False)):
            yield Case(
                family=next(families),
                tp=tp,
                pp=pp,
                cp=cp,
                dp=dp,
                sequence_parallel=sequence_parallel,
                packed=packed,
                recompute=next(recomputes),
                distributed_optimizer=next(sharded),
                overlap=next(overlaps),
                virtual=next(virtuals) if pp > 1 else None,
            )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(every_case()) if metafunc.config.getoption("--full-matrix") else FEW
        metafunc.parametrize("case", cases, ids=str)


def run_prime(folder: Path, case: Case) -> Trace:
    """The three steps in the started processes."""
    parallel = ParallelSection(
        world_size=case.num_ranks,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        sequence_parallel=case.sequence_parallel,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
        virtual_pipeline_model_parallel_size=case.virtual,
    )
    with parallel_layout(parallel, seed=1) as layout:
        setup = RoleSetup(
            architecture=read_architecture(folder),
            model=ModelSection(path=str(folder), make_vocab_size_divisible_by=16, recompute_granularity=case.recompute),
            parallel=parallel,
            micro_batch=MicroBatchSection(packed=case.packed, micro_batch_tokens=50),
            layout=layout,
            # A dozen tokens: some responses fit, others do not.
            head=HeadOptions(workspace_bytes=12 * 80 * 4),
        )
        policy, prm = PolicyRole(setup, POLICY, num_steps=NUM_STEPS), PrmRole(setup, PRM, num_steps=NUM_STEPS)
        reference = ReferenceRole(setup)
        models: list[ModelRole] = [policy, prm, reference]
        for model in models:
            model.load_hf(HfFolder(folder))
        logprobs: list[torch.Tensor] = []
        numbers: list[float] = []
        for step in range(NUM_STEPS):
            rollout = make_batch(step)
            old = policy.score(rollout, temperature=TEMPERATURE)
            start, before = reference.score(rollout), prm.score(rollout)
            logprobs += [old, start, before]
            trained = prm.update(rollout, reference_logprobs=start, prm_logprobs=before, window=(), seed=step)
            numbers += [trained.metrics["loss"], trained.metrics["grad_norm"]]
            rewards = PRM.beta * (before - start)
            result = compute_advantages(rollout.outcomes, rewards, rollout.mask, rollout.group_index, ADVANTAGE)
            updated = policy.update(
                rollout,
                result.advantages,
                old_logprobs=old,
                reference_logprobs=start,
                temperature=TEMPERATURE,
                seed=step,
            )
            numbers += [updated.metrics["loss"], updated.metrics["grad_norm"]]
        weights = {
            f"{name}/{key}": tensor.clone()
            for name, model in (("policy", policy), ("prm", prm))
            for key, tensor in model.export_weights()
        }
    return Trace(logprobs=logprobs, numbers=numbers, weights=weights)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory):
    """Folder and reference run of a family, made when first asked for."""
    made: dict[str, tuple[Path, Trace]] = {}

    def of(family: str) -> tuple[Path, Trace]:
        if family not in made:
            folder = save_tiny_model(family, tmp_path_factory.mktemp(family) / family)
            made[family] = folder, slow_prime(folder)
        return made[family]

    return of


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_reference_moves_every_weight(expected, family: str) -> None:
    folder, wanted = expected(family)
    start = HfFolder(folder)
    for name, tensor in wanted.weights.items():
        before = start.fetch(name.partition("/")[2], (slice(None),) * tensor.dim())
        assert (tensor - before).abs().max() > 20 * WEIGHT_BOUND, name


def test_three_steps(gloo_pool, expected, case: Case) -> None:
    folder, wanted = expected(case.family)
    for found in gloo_pool.run(case.num_ranks, run_prime, folder, case):
        for number, (a, b) in enumerate(zip(found.logprobs, wanted.logprobs, strict=True)):
            assert (a - b).abs().max() < LOGPROB_BOUND, ("log-probs", number)
        assert found.numbers == pytest.approx(wanted.numbers, rel=NUMBER_BOUND, abs=NUMBER_BOUND)
        for name, tensor in found.weights.items():
            assert (tensor - wanted.weights[name]).abs().max() < WEIGHT_BOUND, name
