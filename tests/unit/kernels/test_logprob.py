"""The log-prob op against float64 log_softmax on the same inputs."""

from __future__ import annotations

import pytest
import torch
from slow_logprob import LargestTensor, confident_inputs, random_inputs, reference, relative_error

from megatron_prime.kernels import HeadOptions, fused_linear_logprob

# All logits at once, and tiles of a few numbers each with the logits computed again in the backward pass.
WHOLE, TILED = HeadOptions(), HeadOptions(workspace_bytes=300)
EVERY_WAY = [WHOLE, TILED, HeadOptions(workspace_bytes=1), HeadOptions(gemm="onednn", workspace_bytes=300)]


@pytest.mark.parametrize("options", [WHOLE, HeadOptions(workspace_bytes=40)], ids=["whole", "tiled"])
@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.3, 2.0, 5)], ids=["scalar", "per token"])
@pytest.mark.parametrize("entropy", ["none", "grad"])
def test_gradcheck(temperature, entropy, options):
    hidden, weight, targets = random_inputs(5, 4, 9, 7, torch.float64)

    def op(h, w):
        result = fused_linear_logprob(
            h, w, targets, vocab_size=7, temperature=temperature, entropy=entropy, options=options
        )
        return (result.logprobs, result.entropy) if entropy == "grad" else result.logprobs

    assert torch.autograd.gradcheck(op, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 100.0, torch.linspace(0.5, 2.0, 37)])
@pytest.mark.parametrize("options", EVERY_WAY)
def test_matches_log_softmax(temperature, options):
    hidden, weight, targets = random_inputs()
    result = fused_linear_logprob(
        hidden, weight, targets, vocab_size=26, temperature=temperature, entropy="metric", options=options
    )
    logprobs, entropy = reference(hidden, weight, targets, vocab_size=26, temperature=temperature)
    assert result.entropy is not None and result.logprobs.dtype == result.entropy.dtype == torch.float32
    torch.testing.assert_close(result.logprobs.double(), logprobs, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=0, atol=2e-6)


def test_a_low_temperature_scales_logits_not_log_probs():
    """Logits of some thousands: float32 products are as exact as their size allows."""
    hidden, weight, targets = random_inputs()
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26, temperature=1e-2)
    expected, _ = reference(hidden, weight, targets, vocab_size=26, temperature=1e-2)
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=1e-6, atol=5e-4)


@pytest.mark.parametrize("options", EVERY_WAY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", ["metric", "grad"])
def test_gradients_match_with_any_upstream_gradient(dtype, entropy, options):
    hidden, weight, targets = random_inputs(dtype=dtype)
    upstream = torch.linspace(-3.0, 1e4, 37, dtype=torch.float64)
    of_entropy = torch.linspace(500.0, -500.0, 37, dtype=torch.float64) * (entropy == "grad")
    upstream[5] = of_entropy[5] = 0.0
    fast = [t.clone().requires_grad_() for t in (hidden, weight)]
    slow = [t.double().requires_grad_() for t in (hidden, weight)]
    result = fused_linear_logprob(*fast, targets, vocab_size=26, temperature=0.8, entropy=entropy, options=options)
    assert result.entropy is not None and result.entropy.requires_grad == (entropy == "grad")
    ((result.logprobs * upstream).sum() + (result.entropy * of_entropy).sum()).backward()
    logprobs, entropies = reference(*slow, targets, vocab_size=26, temperature=0.8)
    ((logprobs * upstream).sum() + (entropies * of_entropy).sum()).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-3}[dtype]
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        assert relative_error(ours.grad, theirs.grad) < tolerance
    assert fast[1].grad is not None and fast[1].grad[26:].eq(0).all()
    assert fast[0].grad is not None and fast[0].grad[5].eq(0).all()


@pytest.mark.parametrize("vocab_size", [1, 127, 1024, 1031])
def test_vocabularies_that_no_tile_divides(vocab_size):
    """One logit far above all others, which are negative: a column too many or too few would show."""
    hidden, weight, targets = random_inputs(11, 8, vocab_size + 9, vocab_size, scale=0.2)
    hidden[:, 0], weight[:, 0], weight[0, 0] = 6.0, -1.0, 1.0
    weight[vocab_size:] = 50.0
    targets[0], targets[1] = vocab_size - 1, 0
    for options in (WHOLE, HeadOptions(workspace_bytes=11 * 256 * 4), HeadOptions(workspace_bytes=11 * 100 * 4)):
        fast = [t.clone().requires_grad_() for t in (hidden, weight)]
        slow = [t.double().requires_grad_() for t in (hidden, weight)]
        result = fused_linear_logprob(*fast, targets, vocab_size=vocab_size, options=options)
        expected, _ = reference(*slow, targets, vocab_size=vocab_size)
        torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=3e-6)
        upstream = torch.linspace(-1.0, 2.0, 11, dtype=torch.float64)
        (result.logprobs * upstream).sum().backward()
        (expected * upstream).sum().backward()
        for ours, theirs in zip(fast, slow, strict=True):
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-6, atol=2e-6)


def test_bfloat16_inputs_keep_float32_logits():
    hidden, weight, targets = random_inputs(dtype=torch.bfloat16)
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26)
    expected, _ = reference(hidden, weight, targets, vocab_size=26)
    assert result.logprobs.dtype == torch.float32
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", EVERY_WAY)
def test_confident_tokens_keep_their_precision(options):
    hidden, weight, targets = confident_inputs()
    expected, expected_entropy = reference(hidden, weight, targets, vocab_size=13)
    assert expected.exp().min() > 0.99
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=13, entropy="metric", options=options)
    assert result.entropy is not None
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected_entropy, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("options", EVERY_WAY)
def test_gradient_of_confident_tokens_is_rounded_once(dtype, tolerance, options):
    hidden, weight, targets = confident_inputs(dtype)
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    fused_linear_logprob(fast, weight, targets, vocab_size=13, options=options).logprobs.sum().backward()
    logprobs, _ = reference(slow, weight, targets, vocab_size=13)
    logprobs.sum().backward()
    assert fast.grad is not None and slow.grad is not None
    errors = (fast.grad.double() - slow.grad).norm(dim=1) / slow.grad.norm(dim=1)
    # A float32 sum of exponentials close to 1 is 6e-8 apart from the next.
    assert (errors < tolerance + 2e-7 / -torch.expm1(logprobs.detach())).all()


@pytest.mark.parametrize("options", EVERY_WAY)
@pytest.mark.parametrize("offset", [1e4, -1e4, -300.0])
def test_common_offsets_cancel(offset, options):
    """Logits are multiples of 2^-8, so that float32 holds them exactly even at 1e4; only the formulas can err."""
    hidden, weight, targets = random_inputs(20, 3, 29, 26)
    hidden, weight = hidden.mul(4).round() / 4, weight.mul(16).round() / 16
    hidden, weight = (torch.nn.functional.pad(t, (0, 1), value=1.0) for t in (hidden, weight))
    weight[:, 3] = offset
    hidden.requires_grad_()
    result = fused_linear_logprob(hidden, weight, targets, vocab_size=26, entropy="grad", options=options)
    slow = hidden.detach().double().requires_grad_()
    expected, expected_entropy = reference(slow, weight, targets, vocab_size=26)
    assert result.entropy is not None
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected_entropy, rtol=0, atol=2e-6)
    (grad,) = torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), hidden)
    (expected_grad,) = torch.autograd.grad(expected.sum() + expected_entropy.sum(), slow)
    assert relative_error(grad[:, :3], expected_grad[:, :3]) < 2e-6


def test_wide_spread_underflows_to_zero_probability_not_to_nan():
    hidden, weight = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    for options in (WHOLE, HeadOptions(workspace_bytes=1)):
        for target, expected in ((0, 0.0), (1, -2e4)):
            for entropy in ("metric", "grad"):
                result = fused_linear_logprob(
                    hidden, weight, torch.tensor([target]), vocab_size=2, entropy=entropy, options=options
                )
                assert result.logprobs.tolist() == [expected]
                assert result.entropy is not None and result.entropy.tolist() == [0.0]
                grads = torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), (hidden, weight))
                assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("entropy", ["none", "metric", "grad"])
def test_logits_never_exist_beyond_the_workspace_and_new_memory_is_never_read(entropy):
    hidden, weight, targets = random_inputs(num_tokens=60, size=2, rows=50, vocab_size=50)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as largest:
        result = fused_linear_logprob(
            hidden, weight, targets, vocab_size=50, entropy=entropy, options=HeadOptions(workspace_bytes=7 * 50 * 4)
        )
        result.logprobs.sum().backward()
    assert largest.num_elements <= 7 * 50
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    expected, _ = reference(hidden, weight, targets, vocab_size=50)
    torch.testing.assert_close(result.logprobs.double(), expected, rtol=0, atol=2e-6)


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


@pytest.mark.parametrize("options", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "none"])
def test_frozen_inputs_get_no_gradient(trained, options):
    hidden, weight, targets = random_inputs()
    hidden.requires_grad_(trained == "hidden"), weight.requires_grad_(trained == "weight")
    logprobs = fused_linear_logprob(hidden, weight, targets, vocab_size=26, options=options).logprobs
    assert logprobs.requires_grad == (trained != "none")
    if trained != "none":
        logprobs.sum().backward()
    assert (hidden.grad is not None) == (trained == "hidden")
    assert (weight.grad is not None) == (trained == "weight")


@pytest.mark.parametrize("options", [WHOLE, TILED], ids=["whole", "tiled"])
def test_strides_integer_types_and_autocast_do_not_matter(options):
    hidden, weight, targets = random_inputs()
    strided_hidden = torch.stack([hidden, hidden.flip(0)], dim=2)[:, :, 0].requires_grad_()
    strided_weight = weight.T.contiguous().T.requires_grad_()
    assert not strided_hidden.is_contiguous() and not strided_weight.is_contiguous()
    plain = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = fused_linear_logprob(*plain, targets, vocab_size=26, options=options).logprobs
    expected.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused_linear_logprob(
            strided_hidden, strided_weight, targets.int(), vocab_size=26, options=options
        ).logprobs
        actual.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
    for ours, theirs in zip((strided_hidden, strided_weight), plain, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 1e-6


def test_second_derivatives_are_refused():
    hidden, weight, targets = random_inputs(3)
    result = fused_linear_logprob(hidden.requires_grad_(), weight, targets, vocab_size=26)
    assert result.entropy is None
    (gradient,) = torch.autograd.grad(result.logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [WHOLE, TILED], ids=["whole", "tiled"])
def test_the_graph_can_be_walked_twice_with_the_same_bits(options):
    hidden, weight, targets = random_inputs()
    inputs = [t.requires_grad_() for t in (hidden, weight)]
    runs = []
    for _ in range(2):
        logprobs = fused_linear_logprob(*inputs, targets, vocab_size=26, options=options).logprobs
        for _ in range(2):
            runs.append((logprobs, *torch.autograd.grad(logprobs.sum(), inputs, retain_graph=True)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_diverged_hidden_states_are_not_hidden():
    hidden, weight, targets = random_inputs(3)
    hidden[1, 0] = torch.nan
    assert fused_linear_logprob(hidden, weight, targets, vocab_size=26).logprobs.isnan().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, "hidden"),
        ({"weight": torch.zeros(29, 15)}, "weight"),
        ({"weight": torch.zeros(29, 16, dtype=torch.bfloat16)}, "weight torch.bfloat16"),
        ({"weight": torch.zeros(29, 16).half(), "hidden": torch.zeros(37, 16).half()}, "float16"),
        ({"targets": torch.zeros(36, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(37)}, "targets"),
        ({"targets": torch.full((37,), 26)}, "26"),
        ({"targets": torch.full((37,), -100)}, "-100"),
        ({"vocab_size": 30}, "vocab_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(36)}, "temperature"),
        ({"temperature": torch.zeros(37)}, "temperature"),
        ({"sequence_shards": [37]}, "tp_group"),
        ({"weight": torch.zeros(29, 16, requires_grad=True), "accumulate_main_grad": True}, "main_grad"),
        ({"options": HeadOptions(workspace_bytes=0)}, "workspace_bytes"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    hidden, weight, targets = random_inputs()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "vocab_size": 26, **changes}
    with pytest.raises(ValueError, match=message):
        fused_linear_logprob(**arguments)
