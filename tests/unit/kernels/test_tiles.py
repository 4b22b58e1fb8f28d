"""The torch backend alone: statistics and gradients of a block in tiles of a few columns, beside float64."""

from __future__ import annotations

import pytest
import torch
from slow_logprob import random_inputs, reference, relative_error

from megatron_prime.kernels.shard import merge_statistics
from megatron_prime.kernels.tiles import Block, TokenGradients, TorchTiles

NUM_ROWS = 29


def make_block(temperature: float = 1.0) -> Block:
    hidden, weight, targets = random_inputs(rows=NUM_ROWS, vocab_size=NUM_ROWS)
    temperatures = None if temperature == 1.0 else torch.full((len(targets),), temperature)
    return Block(hidden, weight, targets, temperatures)


def tiles_of(num_columns: int, block: Block) -> TorchTiles:
    return TorchTiles("mm", workspace_bytes=num_columns * 4 * len(block.rows))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_columns", [1, 4, NUM_ROWS, 100])
def test_statistics_are_those_of_all_logits_whatever_the_tile(num_columns: int, temperature: float) -> None:
    block = make_block(temperature)
    statistics, kept = tiles_of(num_columns, block).statistics(block, torch.float32, with_entropy=True, keep=False)
    logits = (block.hidden.double() @ block.weight.double().T) / temperature
    assert kept is None
    torch.testing.assert_close(statistics[:, 0].double(), logits.amax(dim=1), rtol=1e-6, atol=1e-6)
    merged = merge_statistics(statistics[None])
    logprobs, entropy = reference(block.hidden, block.weight, block.rows, vocab_size=NUM_ROWS, temperature=temperature)
    torch.testing.assert_close(merged.logprobs.double(), logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(merged.entropies.double(), entropy, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num_columns", [4, 100])
@pytest.mark.parametrize(("with_entropy", "keep"), [(False, False), (False, True), (True, False)])
def test_gradients_are_those_of_the_full_logits(num_columns: int, with_entropy: bool, keep: bool) -> None:
    block, temperature = make_block(0.7), 0.7
    upstream = torch.linspace(-1, 1, len(block.rows)), torch.linspace(0.5, -0.5, len(block.rows))
    tiles = tiles_of(num_columns, block)
    statistics, kept = tiles.statistics(block, torch.float32, with_entropy=with_entropy, keep=keep)
    merged = merge_statistics(statistics[None])
    gradients = TokenGradients(upstream[0], upstream[1] if with_entropy else None)
    # What is there stays: gradients are added.
    grad_hidden, grad_weight = torch.ones_like(block.hidden), torch.ones_like(block.weight)
    tiles.gradients(block, merged, gradients, kept, grad_hidden, grad_weight)
    hidden, weight = (tensor.double().requires_grad_() for tensor in (block.hidden, block.weight))
    logprobs, entropy = reference(hidden, weight, block.rows, vocab_size=NUM_ROWS, temperature=temperature)
    loss = (logprobs * upstream[0]).sum() + ((entropy * upstream[1]).sum() if with_entropy else 0.0)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(grad_hidden - 1, hidden.grad) < 2e-6
    assert relative_error(grad_weight - 1, weight.grad) < 2e-6


def test_a_target_on_another_rank_has_no_logit_and_no_one_hot_part() -> None:
    block = make_block()
    elsewhere = Block(block.hidden, block.weight, torch.full_like(block.rows, -1), None)
    tiles = tiles_of(4, block)
    here, _ = tiles.statistics(block, torch.float32, with_entropy=False, keep=False)
    there, _ = tiles.statistics(elsewhere, torch.float32, with_entropy=False, keep=False)
    assert torch.equal(here[:, :2], there[:, :2])
    assert torch.equal(there[:, 3], torch.zeros(len(block.rows)))
    merged = merge_statistics(here[None])
    ones = TokenGradients(torch.ones(len(block.rows)), None)
    with_target, without = torch.zeros_like(block.hidden), torch.zeros_like(block.hidden)
    tiles.gradients(block, merged, ones, None, with_target, None)
    tiles.gradients(elsewhere, merged, ones, None, without, None)
    torch.testing.assert_close(with_target - without, block.weight[block.rows], rtol=1e-5, atol=1e-5)


def test_blocks_of_tokens_fit_into_the_tile() -> None:
    tiles = TorchTiles("mm", workspace_bytes=2**16)
    assert tiles.block_tokens(num_rows=1000, itemsize=4) == 2**16 // (4 * 256)
    assert tiles.block_tokens(num_rows=8, itemsize=4) == 2**16 // (4 * 8)
    assert TorchTiles("mm", workspace_bytes=1).block_tokens(num_rows=1000, itemsize=4) == 1
    assert TorchTiles("mm", workspace_bytes=2**40).block_tokens(num_rows=1, itemsize=4) == 4096
