"""The log-prob op with its head sharded over 2, 3 and 4 gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_prime.kernels import fused_linear_logprob

NUM_TOKENS, HIDDEN_SIZE = 23, 8
# (tensor-parallel size, rows per rank, vocab_size): even; padding on the last rank; a rank of nothing but padding.
CASES = [(2, 15, 30), (3, 12, 31), (4, 8, 32), (4, 10, 25), (4, 10, 17)]


def inputs(tp_size: int, rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden, full weight with poisoned padding, targets, upstream gradient."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(tp_size * rows, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight[vocab_size:] = torch.nan
    hidden[:, 0] -= 40.0  # pulls the maximum to whichever rank has the smallest first column
    targets = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    targets[0], targets[1] = 0, vocab_size - 1
    upstream = torch.randn(NUM_TOKENS, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, upstream.to(dtype)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    results = {}
    for tp_size in (2, 3, 4):
        group = dist.new_group(list(range(tp_size)))
        for case in CASES:
            if case[0] != tp_size or rank >= tp_size:
                continue
            _, rows, vocab_size = case
            for dtype in (torch.float32, torch.float64):
                hidden, weight, targets, upstream = inputs(*case, dtype)
                hidden.requires_grad_()
                local = weight[rank * rows : (rank + 1) * rows].requires_grad_()
                result = fused_linear_logprob(
                    hidden,
                    local,
                    targets,
                    vocab_size=vocab_size,
                    temperature=1.5,
                    tp_group=group,
                    entropy="metric",
                    chunk_tokens=7,
                )
                grads = torch.autograd.grad(result.logprobs, (hidden, local), upstream)
                results[(*case, dtype)] = [result.logprobs.detach(), result.entropy, *grads]
                empty = fused_linear_logprob(
                    hidden[:0], local, targets[:0], vocab_size=vocab_size, tp_group=group
                ).logprobs
                assert torch.autograd.grad(empty.sum(), local)[0].eq(0).all()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def per_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("logprob_tp")
    # One server imports torch and forks the four processes, instead of four imports.
    mp.get_context("forkserver").set_forkserver_preload(["torch"])
    mp.start_processes(run_rank, args=(str(folder),), nprocs=4, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_shards_compute_what_one_process_does(per_rank, case, dtype):
    tp_size, rows, vocab_size = case
    ranks = [per_rank[rank][(*case, dtype)] for rank in range(tp_size)]
    for logprobs, entropy, grad_hidden, _ in ranks[1:]:
        assert torch.equal(logprobs, ranks[0][0])
        assert torch.equal(entropy, ranks[0][1])
        assert torch.equal(grad_hidden, ranks[0][2])

    hidden, weight, targets, upstream = (t.double() if t.is_floating_point() else t for t in inputs(*case, dtype))
    hidden.requires_grad_()
    real = weight[:vocab_size].requires_grad_()
    table = torch.log_softmax(hidden @ real.T / 1.5, dim=1)
    expected = table.gather(1, targets[:, None]).squeeze(1)
    grad_hidden, grad_real = torch.autograd.grad(expected, (hidden, real), upstream)
    grad_weight = torch.nn.functional.pad(grad_real, (0, 0, 0, tp_size * rows - vocab_size))
    entropy = -(table.exp() * table).sum(dim=1)

    tolerance = 1e-12 if dtype == torch.float64 else 3e-5  # logits of 100: float32 holds them to 8e-6
    actual_weight = torch.cat([rank[3] for rank in ranks])
    for actual, wanted in (
        (ranks[0][0], expected),
        (ranks[0][1], entropy),
        (ranks[0][2], grad_hidden),
        (actual_weight, grad_weight),
    ):
        torch.testing.assert_close(actual.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
