"""What a model gives away besides its tensors."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from megatron_prime.mcore.residency import Residency


class Linear(torch.nn.Linear):
    """Keeps copies of its weight, as Transformer Engine's layers do."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._fp8_workspaces = {"weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("gives_away", ["none", "gradients", "all"])
def test_fp8_copies_of_weights_are_not_kept_asleep(gives_away: Literal["none", "gradients", "all"]) -> None:
    layer = Linear()
    chunks = [torch.nn.Sequential(torch.nn.ReLU(), layer)]
    weight = layer.weight.detach().clone()
    residency = Residency(gives_away)
    residency.sleep(chunks)
    assert bool(layer._fp8_workspaces) == (gives_away == "none")
    residency.wake(training=True)
    assert torch.equal(layer.weight, weight)
