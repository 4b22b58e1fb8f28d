"""The log-prob op with its head sharded over 1 to 4 gloo processes, and its hidden states whole or sharded too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prime.kernels import HeadOptions, fused_linear_logprob, fused_linear_logprob_loss

NUM_TOKENS, HIDDEN_SIZE = 23, 8
LENGTHS = (6, 1, 9, 7)
# (tensor-parallel size, rows per rank, vocab_size): even; padding on the last rank; a rank of nothing but padding.
CASES = [(1, 20, 17), (2, 15, 30), (3, 12, 31), (4, 8, 32), (4, 10, 25), (4, 10, 17)]
# Rows of the sequence on each rank; uneven, since ranks hold different numbers of response tokens.
SHARDS = {1: (23,), 2: (20, 3), 3: (0, 11, 12), 4: (6, 0, 0, 17)}
DTYPES = (torch.float32, torch.float64)
ENTRIES = ("op", "op_sequence_parallel", "loss", "loss_sequence_parallel")


def inputs(tp_size: int, rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden, full weight with poisoned padding, targets, upstream gradients of log-probs and entropies."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(tp_size * rows, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight[vocab_size:] = torch.nan
    hidden[:, 0] -= 40.0  # pulls the maximum to whichever rank has the smallest first column
    targets = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    targets[0], targets[1] = 0, vocab_size - 1
    upstream, of_entropy = torch.randn(2, NUM_TOKENS, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.to(dtype), weight.to(dtype), targets, upstream, of_entropy


def compute(entry: str, case: tuple[int, int, int], dtype: torch.dtype, group: Any, backend: Any) -> list[torch.Tensor]:
    """Log-probs, entropies, gradient of the hidden states (whole) and of this rank's rows."""
    tp_size, rows, vocab_size = case
    rank = dist.get_rank(group)
    hidden, weight, targets, upstream, of_entropy = inputs(*case, dtype)
    shards = SHARDS[tp_size] if entry.endswith("sequence_parallel") else None
    mine = hidden if shards is None else hidden.split(shards)[rank]
    mine = mine.clone().requires_grad_()
    local = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    arguments: dict[str, Any] = {
        "vocab_size": vocab_size,
        "temperature": torch.linspace(0.7, 1.5, NUM_TOKENS),
        "tp_group": group,
        "sequence_shards": shards,
        "entropy": "grad",
        # Ten tokens at a time, in small tiles.
        "options": HeadOptions(workspace_bytes=10 * rows * 8, backend=backend),
    }
    if entry.startswith("op"):
        result = fused_linear_logprob(mine, local, targets, **arguments)
        assert result.entropy is not None
        loss = (result.logprobs * upstream + result.entropy * of_entropy).sum()
    else:
        result = fused_linear_logprob_loss(
            mine,
            local,
            targets,
            lambda p, h, chunk: (p * upstream[chunk] + h * of_entropy[chunk]).sum(),
            sequence_lengths=LENGTHS,
            **arguments,
        )
        assert result.entropy is not None
        loss = result.loss
    grad_hidden, grad_local = torch.autograd.grad(loss, (mine, local))
    if shards is not None:
        parts: list[Any] = [None] * tp_size
        dist.all_gather_object(parts, grad_hidden, group=group)
        grad_hidden = torch.cat(parts)
    return [result.logprobs.detach(), result.entropy.detach(), grad_hidden, grad_local]


def run_rank(cases: list[tuple[int, int, int]], entries: tuple[str, ...], backend: str) -> dict[Any, Any]:
    dist.init_process_group("gloo")
    results = {}
    try:
        for tp_size in sorted({case[0] for case in cases}):
            group = dist.new_group(list(range(tp_size)))
            for case in cases:
                if case[0] != tp_size or dist.get_rank() >= tp_size:
                    continue
                for dtype in DTYPES if backend == "torch" else DTYPES[:1]:
                    for entry in entries:
                        results[(case, dtype, entry)] = compute(entry, case, dtype, group, backend)
                hidden, weight, targets, *_ = inputs(*case, torch.float32)
                local = weight[: case[1]].nan_to_num().requires_grad_()
                empty = fused_linear_logprob(hidden[:0], local, targets[:0], vocab_size=case[2], tp_group=group)
                assert torch.autograd.grad(empty.logprobs.sum(), local)[0].eq(0).all()
    finally:
        dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def per_rank(gloo_pool) -> list[dict]:
    return gloo_pool.run(4, run_rank, CASES, ENTRIES, "torch")


def assert_computes_what_one_process_does(ranks: list[list[torch.Tensor]], case, dtype, tolerance: float) -> None:
    tp_size, rows, vocab_size = case
    for logprobs, entropy, grad_hidden, _ in ranks[1:]:
        assert torch.equal(logprobs, ranks[0][0])
        assert torch.equal(entropy, ranks[0][1])
        assert torch.equal(grad_hidden, ranks[0][2])

    everything = (t.double() if t.is_floating_point() else t for t in inputs(*case, dtype))
    hidden, weight, targets, upstream, of_entropy = everything
    hidden.requires_grad_()
    real = weight[:vocab_size].requires_grad_()
    table = torch.log_softmax(hidden @ real.T / torch.linspace(0.7, 1.5, NUM_TOKENS)[:, None].double(), dim=1)
    expected = table.gather(1, targets[:, None]).squeeze(1)
    entropy = -(table.exp() * table).sum(dim=1)
    grad_hidden, grad_real = torch.autograd.grad((expected * upstream + entropy * of_entropy).sum(), (hidden, real))
    grad_weight = torch.nn.functional.pad(grad_real, (0, 0, 0, tp_size * rows - vocab_size))
    actual_weight = torch.cat([rank[3] for rank in ranks])
    for actual, wanted in (
        (ranks[0][0], expected),
        (ranks[0][1], entropy),
        (ranks[0][2], grad_hidden),
        (actual_weight, grad_weight),
    ):
        torch.testing.assert_close(actual.double(), wanted.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_shards_compute_what_one_process_does(per_rank, case, dtype, entry):
    ranks = [per_rank[rank][(case, dtype, entry)] for rank in range(case[0])]
    # Logits of 200: float32 holds them to 1.5e-5, and gradients are as large as the hidden states, 40.
    assert_computes_what_one_process_does(ranks, case, dtype, 1e-12 if dtype == torch.float64 else 1e-4)


def test_triton_shards_compute_what_one_process_does(gloo_pool):
    pytest.importorskip("triton", reason="the Triton backend's tests need triton (megatron-prime[dev])")
    cases, entries = [(2, 15, 30), (4, 10, 17)], ("op", "loss_sequence_parallel")
    results = gloo_pool.run(4, run_rank, cases, entries, "triton")
    for case in cases:
        for entry in entries:
            ranks = [results[rank][(case, torch.float32, entry)] for rank in range(case[0])]
            assert_computes_what_one_process_does(ranks, case, torch.float32, 1e-4)
