"""The loss inside the chunks: what the op and the loss after it compute, in one pass."""

from __future__ import annotations

import pytest
import torch
from slow_logprob import LargestTensor, random_inputs, reference, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prime.algorithm import (
    PolicyTokens,
    cross_entropy_loss,
    implicit_rewards,
    policy_loss,
)
from megatron_prime.config.schema import PolicySection
from megatron_prime.errors import TrainingError
from megatron_prime.kernels import HeadOptions, fused_linear_logprob, fused_linear_logprob_loss
from megatron_prime.kernels.loss import cut_chunks

LENGTHS = (5, 1, 14, 8, 9)
OPTIONS = PolicySection(clip_ratio_low=0.2, clip_ratio_high=0.3, dual_clip=3.0, kl_coef=0.1)
# Everything at once; a few tokens at a time; nothing kept, so that logits are computed twice.
WORKSPACES = [2**20, 12 * 29 * 4, 1]


def token_data(dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Old log-probs, advantages, weights and reference log-probs of 37 tokens, and labels of 5 sequences."""
    generator = torch.Generator().manual_seed(1)
    old, advantages, references = (torch.randn(37, generator=generator) for _ in range(3))
    weights = torch.full((37,), 1 / 37)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    return tuple(t.to(dtype) for t in (old * 0.3 - 3, advantages, weights, references * 0.3 - 3, labels))


def ppo(logprobs: torch.Tensor, chunk: slice) -> torch.Tensor:
    old, advantages, weights, references, _ = (t[chunk] for t in token_data(logprobs.dtype))
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=advantages,
        weights=weights,
        reference_logprobs=references,
    )
    return policy_loss(tokens, OPTIONS)[0]


def prm(logprobs: torch.Tensor, chunk: slice) -> torch.Tensor:
    """Sequence-level cross-entropy: needs the whole sequence at once."""
    references, labels = token_data(logprobs.dtype)[3:]
    bounds = torch.tensor(LENGTHS).cumsum(0)
    mine = [i for i, stop in enumerate(bounds.tolist()) if chunk.start < stop <= chunk.stop]
    assert sum(LENGTHS[i] for i in mine) == chunk.stop - chunk.start
    rewards = implicit_rewards(logprobs, references[chunk], torch.ones_like(logprobs, dtype=torch.bool), beta=0.5)
    logits = torch.stack([part.sum() for part in rewards.split([LENGTHS[i] for i in mine])])
    return cross_entropy_loss(logits, labels[mine], num_responses=len(LENGTHS))


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("loss", "lengths"), [(ppo, None), (ppo, LENGTHS), (prm, LENGTHS)])
def test_same_loss_and_gradients_as_the_loss_after_the_op(loss, lengths, dtype, workspace):
    hidden, weight, targets = random_inputs(dtype=dtype)
    fast = [t.clone().requires_grad_() for t in (hidden, weight)]
    slow = [t.double().requires_grad_() for t in (hidden, weight)]
    result = fused_linear_logprob_loss(
        *fast,
        targets,
        lambda logprobs, _, chunk: loss(logprobs, chunk),
        vocab_size=26,
        temperature=0.8,
        sequence_lengths=lengths,
        entropy="metric",
        options=HeadOptions(workspace_bytes=workspace),
    )
    (result.loss * 3).backward()
    logprobs, entropies = reference(*slow, targets, vocab_size=26, temperature=0.8)
    expected = loss(logprobs, slice(0, 37))
    (expected * 3).backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert result.entropy is not None and not result.logprobs.requires_grad
    torch.testing.assert_close(result.logprobs.double(), logprobs.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), entropies.detach(), rtol=0, atol=2e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        assert relative_error(ours.grad, theirs.grad) < tolerance


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_loss_of_the_entropy(workspace):
    hidden, weight, targets = random_inputs(dtype=torch.float64)
    fast, slow = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    bonus = torch.linspace(-1.0, 1.0, 37, dtype=torch.float64)

    def loss(logprobs, entropy, chunk):
        return (logprobs.exp() + bonus[chunk] * entropy).sum()

    fused_linear_logprob_loss(
        *fast, targets, loss, vocab_size=26, entropy="grad", options=HeadOptions(workspace_bytes=workspace)
    ).loss.backward()
    loss(*reference(*slow, targets, vocab_size=26), slice(0, 37)).backward()
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 1e-12


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_three_products_where_the_two_passes_need_four():
    """Counted, since time on a small problem says nothing."""
    hidden, weight, targets = (t.requires_grad_(t.is_floating_point()) for t in random_inputs())
    options = HeadOptions(workspace_bytes=12 * 29 * 4)
    product = 2 * 37 * 16 * 26
    with Products() as two_passes:
        fused_linear_logprob(hidden, weight, targets, vocab_size=26, options=options).logprobs.sum().backward()
    assert two_passes.operations == 4 * product
    with Products() as one_pass:
        fused_linear_logprob_loss(
            hidden, weight, targets, lambda p, _, chunk: p.sum(), vocab_size=26, options=options
        ).loss.backward()
    assert one_pass.operations == 3 * product


def test_the_workspace_bounds_what_exists():
    hidden, weight, targets = random_inputs(num_tokens=60, size=2, rows=50, vocab_size=50)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as largest:
        fused_linear_logprob_loss(
            hidden,
            weight,
            targets,
            lambda p, _, chunk: p.sum(),
            vocab_size=50,
            options=HeadOptions(workspace_bytes=7 * 50 * 4),
        ).loss.backward()
    assert largest.num_elements <= 7 * 50
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("max_tokens", "lengths", "expected"),
    [
        (4, None, [4, 4, 2]),
        (100, None, [10]),
        (4, (3, 1, 4, 2), [4, 4, 2]),
        (3, (2, 6, 1, 1), [2, 6, 2]),
        (1, (5, 5), [5, 5]),
        (6, (0, 10, 0), [10]),
    ],
)
def test_chunks_cover_all_tokens_and_end_with_sequences(max_tokens, lengths, expected):
    chunks = list(cut_chunks(10, max_tokens, lengths))
    assert [chunk.stop - chunk.start for chunk in chunks] == expected
    assert [i for chunk in chunks for i in range(10)[chunk]] == list(range(10))


def test_no_tokens_no_loss():
    hidden, weight, targets = random_inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    result = fused_linear_logprob_loss(hidden, weight, targets, lambda p, _, chunk: 1 / 0, vocab_size=26)
    result.loss.backward()
    assert result.loss.item() == 0 and result.logprobs.shape == (0,)
    assert hidden.grad is not None and weight.grad is not None and weight.grad.eq(0).all()


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, targets = random_inputs()
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros_like(weight.data)
    with torch.no_grad():
        result = fused_linear_logprob_loss(
            hidden, weight, targets, lambda p, _, chunk: -p.sum(), vocab_size=26, accumulate_main_grad=True
        )
    expected, _ = reference(hidden, weight.detach(), targets, vocab_size=26)
    assert result.loss.item() == pytest.approx(-expected.sum().item(), rel=1e-6)
    assert weight.main_grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", ["two passes", "loss"])
def test_the_weight_gradient_adds_up_in_main_grad(entry, dtype):
    """As Megatron's own layers do it: float32, over micro-batches, with a promise instead of a gradient."""
    hidden, plain, targets = random_inputs(dtype=dtype)
    weight = torch.nn.Parameter(plain.clone())
    weight.main_grad = torch.zeros(plain.shape)
    weight.grad_added_to_main_grad = False
    slow = plain.double().requires_grad_()
    for part in (slice(0, 20), slice(20, 37)):
        if entry == "loss":
            loss = fused_linear_logprob_loss(
                hidden[part],
                weight,
                targets[part],
                lambda p, _, chunk: p.square().sum(),
                vocab_size=26,
                accumulate_main_grad=True,
            ).loss
        else:
            op = fused_linear_logprob(hidden[part], weight, targets[part], vocab_size=26, accumulate_main_grad=True)
            loss = op.logprobs.square().sum()
        loss.backward()
        reference(hidden[part], slow, targets[part], vocab_size=26)[0].square().sum().backward()
        assert weight.grad_added_to_main_grad and weight.grad is not None
        weight.grad = None
    assert slow.grad is not None
    assert relative_error(weight.main_grad, slow.grad) < (2e-6 if dtype == torch.float32 else 3e-3)


def test_a_tied_head_leaves_grad_to_the_embedding():
    _, plain, targets = random_inputs()
    weight = torch.nn.Parameter(plain.clone())
    weight.main_grad, weight.zero_out_wgrad = torch.zeros(plain.shape), True
    embedded = torch.nn.functional.embedding(targets, weight)
    result = fused_linear_logprob(embedded * 0.1, weight, targets, vocab_size=26, accumulate_main_grad=True)
    result.logprobs.sum().backward()
    slow = plain.double().requires_grad_()
    reference(torch.nn.functional.embedding(targets, slow) * 0.1, slow, targets, vocab_size=26)[0].sum().backward()
    assert weight.grad is not None and slow.grad is not None
    assert relative_error(weight.grad + weight.main_grad, slow.grad) < 2e-6


def test_a_scaled_loss_is_refused_when_main_grad_has_the_gradient_already():
    hidden, weight, targets = random_inputs()
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros_like(weight.data)
    result = fused_linear_logprob_loss(
        hidden.requires_grad_(),
        weight,
        targets,
        lambda p, _, chunk: p.sum(),
        vocab_size=26,
        accumulate_main_grad=True,
    )
    with pytest.raises(TrainingError, match=r"2\.0.*main_grad"):
        (2 * result.loss).backward()


def test_wrong_sequence_lengths_are_named():
    hidden, weight, targets = random_inputs()
    with pytest.raises(ValueError, match="sequence_lengths sum to 3"):
        fused_linear_logprob_loss(
            hidden, weight, targets, lambda p, _, chunk: p.sum(), vocab_size=26, sequence_lengths=[3]
        )
