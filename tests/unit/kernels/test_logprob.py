"""The log-prob op against float64 log_softmax on the same inputs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prime.kernels import fused_linear_logprob


def reference(hidden, weight, targets, *, vocab_size, temperature: float | torch.Tensor = 1.0):
    """(log-probs, entropy) in float64 from the full logits, differentiable."""
    scale = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    table = torch.log_softmax(hidden.double() @ weight.double()[:vocab_size].T / scale, dim=1)
    return table.gather(1, targets.long()[:, None]).squeeze(1), -(table.exp() * table).sum(dim=1)


def random_inputs(num_tokens=37, size=16, rows=29, vocab_size=26, dtype=torch.float32, scale=0.5, seed=0):
    """hidden, weight, targets; logits stay below 10, where float32 numbers are 1e-6 apart."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, size, generator=generator) * scale
    weight = torch.randn(rows, size, generator=generator)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("temperature", ["scalar", "per token"])
def test_gradcheck(temperature):
    hidden, weight, targets = random_inputs(5, 4, 9, 7, torch.float64)
    value = 0.7 if temperature == "scalar" else torch.linspace(0.3, 2.0, 5)

    def op(h, w):
        return fused_linear_logprob(h, w, targets, vocab_size=7, temperature=value, chunk_tokens=2).logprobs

    assert torch.autograd.gradcheck(op, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.linspace(0.5, 2.0, 37)])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1024])
def test_matches_log_softmax(temperature, chunk_tokens):
    hidden, weight, targets = random_inputs()
    result = fused_linear_logprob(
        hidden,
        weight,
        targets,
        vocab_size=26,
        temperature=temperature,
        entropy="metric",
        chunk_tokens=chunk_tokens,
    )
    logprobs, entropy = reference(hidden, weight, targets, vocab_size=26, temperature=temperature)
    assert result.entropy is not None and result.logprobs.dtype == result.entropy.dtype == torch.float32
    torch.testing.assert_close(result.logprobs.double(), logprobs, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_match_with_any_upstream_gradient(dtype):
    hidden, weight, targets = random_inputs(dtype=dtype)
    upstream = torch.linspace(-3.0, 1e4, 37, dtype=torch.float64)
    upstream[5] = 0.0
    fast = [t.clone().requires_grad_() for t in (hidden, weight)]
    slow = [t.double().requires_grad_() for t in (hidden, weight)]
    result = fused_linear_logprob(*fast, targets, vocab_size=26, temperature=0.8, chunk_tokens=10)
    result.logprobs.backward(upstream.to(result.logprobs.dtype))
    reference(*slow, targets, vocab_size=26, temperature=0.8)[0].backward(upstream)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        assert relative_error(ours.grad, theirs.grad) < tolerance
    assert fast[1].grad is not None and fast[1].grad[26:].eq(0).all()
    assert fast[0].grad is not None and fast[0].grad[5].eq(0).all()


def test_bfloat16_inputs_keep_float32_logits():
    hidden, weight, targets = random_inputs(dtype=torch.bfloat16)
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26)
    expected, _ = reference(hidden, weight, targets, vocab_size=26)
    assert result.logprobs.dtype == torch.float32
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)


def confident_inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets of probability 0.99 to 1 - 1e-6; logits are sums of few exact products."""
    hidden, weight, targets = random_inputs(24, 8, 13, 13, scale=0.25)
    hidden[:, 0] = torch.linspace(4.0, 8.0, 24)
    weight[:, 0] = -1.0
    weight[3, 0], targets[:] = 1.0, 3
    return hidden.to(dtype), weight.to(dtype), targets


def test_confident_tokens_keep_their_precision():
    hidden, weight, targets = confident_inputs()
    expected, expected_entropy = reference(hidden, weight, targets, vocab_size=13)
    assert expected.exp().min() > 0.99
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=13, entropy="metric")
    assert result.entropy is not None
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected_entropy, rtol=0, atol=2e-6)


def test_gradient_of_confident_tokens_is_rounded_once():
    hidden, weight, targets = confident_inputs(torch.bfloat16)
    hidden, weight = hidden[:12], weight
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    fused_linear_logprob(fast, weight, targets[:12], vocab_size=13).logprobs.sum().backward()
    reference(slow, weight, targets[:12], vocab_size=13)[0].sum().backward()
    assert fast.grad is not None and slow.grad is not None
    assert relative_error(fast.grad, slow.grad) < 4e-3


@pytest.mark.parametrize("offset", [1e4, -1e4, -300.0])
def test_common_offsets_cancel(offset):
    """Logits are multiples of 2^-8, so that float32 holds them exactly even at 1e4; only the formulas can err."""
    hidden, weight, targets = random_inputs(20, 3, 29, 26)
    hidden, weight = hidden.mul(4).round() / 4, weight.mul(16).round() / 16
    hidden, weight = (torch.nn.functional.pad(t, (0, 1), value=1.0) for t in (hidden, weight))
    weight[:, 3] = offset
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26, entropy="metric")
    expected, expected_entropy = reference(hidden, weight, targets, vocab_size=26)
    assert result.entropy is not None
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected_entropy, rtol=0, atol=2e-6)


def test_wide_spread_underflows_to_zero_probability_not_to_nan():
    hidden, weight = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    for target, expected in ((0, 0.0), (1, -2e4)):
        result = fused_linear_logprob(hidden, weight, torch.tensor([target]), vocab_size=2, entropy="metric")
        assert result.logprobs.tolist() == [expected]
        assert result.entropy is not None and result.entropy.tolist() == [0.0]
        grads = torch.autograd.grad(result.logprobs.sum(), (hidden, weight))
        assert all(g.isfinite().all() for g in grads)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any torch operation."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("entropy", ["none", "metric"])
def test_logits_never_exist_for_more_than_a_chunk(entropy):
    hidden, weight, targets = random_inputs(num_tokens=60, size=2, rows=50, vocab_size=50)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as largest:
        result = fused_linear_logprob(hidden, weight, targets, vocab_size=50, entropy=entropy, chunk_tokens=7)
        result.logprobs.sum().backward()
    assert largest.num_elements == 7 * 50


def test_padding_rows_take_no_part():
    hidden, weight, targets = random_inputs()
    poisoned = weight.clone()
    poisoned[26:] = torch.nan
    result = fused_linear_logprob(hidden, poisoned, targets, vocab_size=26)
    assert torch.equal(result.logprobs, fused_linear_logprob(hidden, weight[:26], targets, vocab_size=26).logprobs)


def test_empty_batch_gives_zero_gradients():
    hidden, weight, targets = random_inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26, entropy="metric")
    assert result.logprobs.shape == (0,) and result.entropy is not None and result.entropy.shape == (0,)
    result.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 16)
    assert weight.grad is not None and weight.grad.eq(0).all() and weight.grad.shape == (29, 16)


@pytest.mark.parametrize("trained", ["hidden", "weight", "none"])
def test_frozen_inputs_get_no_gradient(trained):
    hidden, weight, targets = random_inputs()
    hidden.requires_grad_(trained == "hidden"), weight.requires_grad_(trained == "weight")
    logprobs = fused_linear_logprob(hidden, weight, targets, vocab_size=26).logprobs
    assert logprobs.requires_grad == (trained != "none")
    if trained != "none":
        logprobs.sum().backward()
    assert (hidden.grad is not None) == (trained == "hidden")
    assert (weight.grad is not None) == (trained == "weight")


def test_strides_integer_types_and_autocast_do_not_matter():
    hidden, weight, targets = random_inputs()
    strided_hidden = torch.stack([hidden, hidden.flip(0)], dim=2)[:, :, 0].requires_grad_()
    strided_weight = weight.T.contiguous().T.requires_grad_()
    assert not strided_hidden.is_contiguous() and not strided_weight.is_contiguous()
    plain = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = fused_linear_logprob(*plain, targets, vocab_size=26).logprobs
    expected.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused_linear_logprob(strided_hidden, strided_weight, targets.int(), vocab_size=26).logprobs
        actual.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
    for ours, theirs in zip((strided_hidden, strided_weight), plain, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 1e-6


def test_entropy_is_a_metric_and_second_derivatives_are_refused():
    hidden, weight, targets = random_inputs(3)
    result = fused_linear_logprob(hidden.requires_grad_(), weight, targets, vocab_size=26, entropy="metric")
    assert result.entropy is not None and not result.entropy.requires_grad and result.logprobs.requires_grad
    assert fused_linear_logprob(hidden, weight, targets, vocab_size=26).entropy is None
    (gradient,) = torch.autograd.grad(result.logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_diverged_hidden_states_are_not_hidden():
    hidden, weight, targets = random_inputs(3)
    hidden[1, 0] = torch.nan
    assert fused_linear_logprob(hidden, weight, targets, vocab_size=26).logprobs.isnan().tolist() == [0, 1, 0]


def test_two_calls_are_bitwise_equal():
    hidden, weight, targets = random_inputs()
    runs = []
    for _ in range(2):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight)]
        logprobs = fused_linear_logprob(*inputs, targets, vocab_size=26, chunk_tokens=7).logprobs
        runs.append((logprobs, *torch.autograd.grad(logprobs.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, "hidden"),
        ({"weight": torch.zeros(29, 15)}, "weight"),
        ({"weight": torch.zeros(29, 16, dtype=torch.bfloat16)}, "dtype"),
        ({"targets": torch.zeros(36, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(37)}, "targets"),
        ({"targets": torch.full((37,), 26)}, "26"),
        ({"targets": torch.full((37,), -100)}, "-100"),
        ({"vocab_size": 30}, "vocab_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(36)}, "temperature"),
        ({"temperature": torch.zeros(37)}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    hidden, weight, targets = random_inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "vocab_size": 26, **changes}
    with pytest.raises(ValueError, match=message):
        fused_linear_logprob(**arguments)
