"""Which kernels the optimizer runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_prime.mcore.cpu import megatron_platform

with megatron_platform():
    from megatron_prime.mcore.optimizer import _use_fused_adam


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_adam_of_torch_is_fused_on_every_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, chained: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    adam = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    other = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    parts = [SimpleNamespace(optimizer=inner) for inner in (adam, other, None)]
    _use_fused_adam(SimpleNamespace(chained_optimizers=parts) if chained else parts[0])
    assert adam.param_groups[0]["fused"]
    assert not other.param_groups[0]["fused"]
