"""What a user could call instead of the log-prob op, behind one signature, for the benchmarks beside this file.

Every variant runs forward and backward once with random upstream gradients and returns the log-probs, or raises
`NotHere` with the reason why it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_prime.kernels import HeadOptions, fused_linear_logprob, fused_linear_logprob_loss


class NotHere(Exception):
    """A variant that cannot run on this machine; the message says why."""


@dataclass
class Problem:
    """Inputs of one run; `hidden` and `weight` want gradients."""

    hidden: torch.Tensor
    weight: torch.nn.Parameter
    targets: torch.Tensor
    upstream: torch.Tensor
    options: HeadOptions

    @classmethod
    def random(
        cls, num_tokens: int, size: int, vocab_size: int, dtype: torch.dtype, device: str, options: HeadOptions
    ) -> Problem:
        """Peaked rows: every fourth token is certain, the others have logits of unit variance."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_tokens, size, generator=generator)
        weight = torch.randn(vocab_size, size, generator=generator).mul_(size**-0.5)
        targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
        hidden[::4] += 20 * F.normalize(weight[targets[::4]])
        upstream = torch.randn(num_tokens, generator=generator)
        return cls(
            hidden.to(device, dtype).requires_grad_(),
            torch.nn.Parameter(weight.to(device, dtype)),
            targets.to(device),
            upstream.to(device),
            options,
        )

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]


def naive(problem: Problem) -> torch.Tensor:
    """All logits, log_softmax, gather."""
    logits = (problem.hidden @ problem.weight.T).float()
    logprobs = logits.log_softmax(dim=-1).gather(1, problem.targets[:, None]).squeeze(1)
    logprobs.backward(problem.upstream)
    return logprobs.detach()


def torch_native(problem: Problem) -> torch.Tensor:
    """`F.linear_cross_entropy`, per token."""
    losses = F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none")
    losses.backward(-problem.upstream.to(losses.dtype))
    return -losses.detach()


def liger_grpo(problem: Problem) -> torch.Tensor:
    """Liger's chunked GRPO loss (torch code, as it runs on CPUs too), a response per 256 tokens."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotHere(f"not installed ({error})") from error
    rows = max(1, len(problem.targets) // 256)
    hidden = problem.hidden.view(rows, -1, problem.hidden.shape[1])
    targets = problem.targets.view(rows, -1)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
    value, _ = loss(hidden, problem.weight, targets, torch.ones_like(targets), problem.upstream[:rows])
    value.backward()
    # It gives the loss only.
    return problem.upstream.new_empty(0)


def liger_triton(problem: Problem) -> torch.Tensor:
    """Liger's fused linear cross-entropy."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotHere(f"not installed ({error})") from error
    try:
        loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
        losses: Any = loss(problem.weight, problem.hidden, problem.targets)
    except RuntimeError as error:
        raise NotHere(str(error)) from error
    losses.backward(-problem.upstream.to(losses.dtype))
    return -losses.detach().float()


def cut_cross_entropy(problem: Problem) -> torch.Tensor:
    """Apple's Cut Cross Entropy."""
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotHere(f"not installed ({error})") from error
    try:
        losses = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, impl="cce", reduction="none")
    except RuntimeError as error:
        raise NotHere(str(error)) from error
    losses.backward(-problem.upstream.to(losses.dtype))
    return -losses.detach().float()


def ours_two_passes(problem: Problem) -> torch.Tensor:
    """The op, for any loss after it."""
    result = fused_linear_logprob(
        problem.hidden, problem.weight, problem.targets, vocab_size=problem.vocab_size, options=problem.options
    )
    result.logprobs.backward(problem.upstream)
    return result.logprobs.detach()


def ours_loss(problem: Problem, *, accumulate_main_grad: bool = False) -> torch.Tensor:
    """The loss inside the chunks."""
    result = fused_linear_logprob_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        lambda logprobs, _, chunk: (logprobs * problem.upstream[chunk]).sum(),
        vocab_size=problem.vocab_size,
        accumulate_main_grad=accumulate_main_grad,
        options=problem.options,
    )
    result.loss.backward()
    return result.logprobs


def ours(problem: Problem) -> torch.Tensor:
    """The loss inside the chunks, with the head's gradient in Megatron's buffer: what a training step calls."""
    return ours_loss(problem, accumulate_main_grad=True)


def ours_forward_only(problem: Problem) -> torch.Tensor:
    """The op as the reference and scoring passes call it."""
    with torch.no_grad():
        result = fused_linear_logprob(
            problem.hidden, problem.weight, problem.targets, vocab_size=problem.vocab_size, options=problem.options
        )
    return result.logprobs


VARIANTS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "naive log_softmax": naive,
    "F.linear_cross_entropy": torch_native,
    "Liger chunked GRPO": liger_grpo,
    "Liger fused linear CE": liger_triton,
    "Cut Cross Entropy": cut_cross_entropy,
    "ours, two passes": ours_two_passes,
    "ours, loss entry": ours_loss,
    "ours": ours,
}


def errors_against_float64(problem: Problem, logprobs: torch.Tensor, num_tokens: int) -> dict[str, float | None]:
    """Largest error of the log-probs and relative error of the hidden gradient on a few random tokens."""
    chosen = torch.randperm(len(problem.targets), generator=torch.Generator().manual_seed(1))[:num_tokens]
    chosen = chosen.to(problem.hidden.device)
    hidden = problem.hidden.detach()[chosen].double()
    tiles = problem.weight.detach().split(8192)
    targets = problem.targets[chosen]
    log_normalizer = torch.logsumexp(
        torch.stack([(hidden @ tile.double().T).logsumexp(dim=1) for tile in tiles]), dim=0
    )
    target_rows = problem.weight.detach()[targets].double()
    exact = (hidden * target_rows).sum(dim=1) - log_normalizer
    result: dict[str, float | None] = {"logprob_error": None, "gradient_error": None}
    if len(logprobs):
        result["logprob_error"] = float((logprobs[chosen].double() - exact).abs().max())
    if problem.hidden.grad is not None and len(logprobs):
        expected = target_rows.clone()
        for tile in tiles:
            expected -= (hidden @ tile.double().T - log_normalizer[:, None]).exp() @ tile.double()
        expected *= problem.upstream[chosen].double()[:, None]
        difference = problem.hidden.grad[chosen].double() - expected
        result["gradient_error"] = float(difference.norm() / expected.norm())
    return result
