"""What the op computes, from the full logits in float64; and inputs to compare on."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


def confident_inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """24 targets of probability 0.99 to 1 - 1e-6 among 13; logits are sums of few exact products."""
    hidden, weight, targets = random_inputs(24, 8, 13, 13, scale=0.25)
    hidden[:, 0] = torch.linspace(4.0, 8.0, 24)
    weight[:, 0] = -1.0
    weight[3, 0], targets[:] = 1.0, 3
    return hidden.to(dtype), weight.to(dtype), targets


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any torch operation, and fills new memory with nan."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
            if "empty" in func.__name__ and result.is_floating_point():
                result.fill_(torch.nan)
        return result
