"""The Triton backend's kernels, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from slow_logprob import confident_inputs, random_inputs, reference, relative_error

from megatron_prime.errors import ConfigError
from megatron_prime.kernels import HeadOptions, choose_backend, fused_linear_logprob, fused_linear_logprob_loss

triton = pytest.importorskip("triton", reason="the Triton backend's tests need triton (megatron-prime[dev])")
CPU = torch.device("cpu")
# Everything kept, and everything computed again in slabs of one tile.
KEPT, AGAIN = HeadOptions(backend="triton"), HeadOptions(backend="triton", workspace_bytes=1)


@pytest.mark.parametrize("options", [KEPT, AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize(
    ("size", "vocab_size", "padding"), [(16, 64, 0), (40, 75, 9), (7, 1, 3)], ids=["divisible", "not", "one"]
)
@pytest.mark.parametrize("entropy", ["metric", "grad"])
def test_matches_log_softmax(size, vocab_size, padding, entropy, options):
    hidden, weight, targets = random_inputs(19, size, vocab_size + padding, vocab_size, scale=0.3)
    targets[0] = vocab_size - 1
    weight[vocab_size:] = torch.nan
    temperature = torch.linspace(0.7, 1.5, 19)
    upstream, of_entropy = torch.randn(2, 19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_entropy *= entropy == "grad"
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    fast_weight, slow_weight = weight.clone().requires_grad_(), weight.double().requires_grad_()
    result = fused_linear_logprob(
        fast,
        fast_weight,
        targets,
        vocab_size=vocab_size,
        temperature=temperature,
        entropy=entropy,
        options=options,
    )
    logprobs, entropies = reference(slow, slow_weight, targets, vocab_size=vocab_size, temperature=temperature)
    assert result.entropy is not None
    torch.testing.assert_close(result.logprobs.double(), logprobs, rtol=0, atol=3e-6)
    torch.testing.assert_close(result.entropy.double(), entropies, rtol=0, atol=3e-6)
    grads = torch.autograd.grad(
        (result.logprobs * upstream).sum() + (result.entropy.double() * of_entropy).sum(), (fast, fast_weight)
    )
    wanted = torch.autograd.grad((logprobs * upstream).sum() + (entropies * of_entropy).sum(), (slow, slow_weight))
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm() + 1e-12


@pytest.mark.parametrize("offset", [1e4, -300.0])
def test_common_offsets_cancel(offset):
    hidden, weight, targets = random_inputs(20, 3, 29, 26)
    hidden, weight = hidden.mul(4).round() / 4, weight.mul(16).round() / 16
    hidden, weight = (torch.nn.functional.pad(t, (0, 1), value=1.0) for t in (hidden, weight))
    weight[:, 3] = offset
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26, entropy="metric", options=KEPT)
    expected, expected_entropy = reference(hidden, weight, targets, vocab_size=26)
    assert result.entropy is not None
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected_entropy, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [KEPT, AGAIN], ids=["kept", "again"])
def test_confident_tokens(options):
    hidden, weight, targets = confident_inputs()
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    ours = fused_linear_logprob(fast, weight, targets, vocab_size=13, options=options).logprobs
    theirs, _ = reference(slow, weight, targets, vocab_size=13)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)
    ours.sum().backward()
    theirs.sum().backward()
    assert fast.grad is not None and slow.grad is not None
    errors = (fast.grad.double() - slow.grad).norm(dim=1) / slow.grad.norm(dim=1)
    assert (errors < 1e-6 + 2e-7 / -torch.expm1(theirs.detach())).all()


def test_bfloat16_keeps_float32_logits():
    """Gradients are rounded to bfloat16, which the interpreter does by cutting off: errors are twice a GPU's."""
    hidden, weight, targets = random_inputs(dtype=torch.bfloat16)
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    ours = fused_linear_logprob(fast, weight, targets, vocab_size=26, options=KEPT).logprobs
    theirs, _ = reference(slow, weight, targets, vocab_size=26)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)
    ours.sum().backward()
    theirs.sum().backward()
    assert fast.grad is not None and slow.grad is not None and fast.grad.dtype == torch.bfloat16
    assert relative_error(fast.grad, slow.grad) < 6e-3


@pytest.mark.parametrize("options", [KEPT, AGAIN], ids=["kept", "again"])
def test_the_loss_entry(options):
    hidden, weight, targets = random_inputs(23, 16)
    fast, slow = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    result = fused_linear_logprob_loss(
        *fast,
        targets,
        lambda p, _, chunk: p.square().sum(),
        vocab_size=26,
        sequence_lengths=(10, 13),
        options=options,
    )
    result.loss.backward()
    reference(*slow, targets, vocab_size=26)[0].square().sum().backward()
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 2e-6


def test_more_token_tiles_than_a_group():
    """Nineteen tiles of sixteen tokens in groups of sixteen, and three splits."""
    hidden, weight, targets = random_inputs(300, 4, 80, 80)
    ours = fused_linear_logprob(hidden, weight, targets, vocab_size=80, options=AGAIN).logprobs
    torch.testing.assert_close(ours.double(), reference(hidden, weight, targets, vocab_size=80)[0], rtol=0, atol=2e-6)


def test_the_device_decides_and_an_impossible_wish_is_refused(monkeypatch):
    assert choose_backend("auto", CPU) == choose_backend("torch", CPU) == "torch"
    assert choose_backend("triton", CPU) == "triton"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=r"head.backend: 'triton' has no compiler for CPUs.*use 'auto' or 'torch'"):
        choose_backend("triton", CPU)
