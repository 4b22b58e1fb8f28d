"""What a model gives away besides its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from megatron_prime.mcore.residency import _EXACT_SIZES, Residency, pin_exact_sizes


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


@pytest.fixture
def allocator_settings() -> Iterator[None]:
    before = torch._C._accelerator_getAllocatorSettings()
    pin_exact_sizes.cache_clear()
    yield
    pin_exact_sizes.cache_clear()
    torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", _EXACT_SIZES),
        ("max_split_size_mb:100", f"max_split_size_mb:100,{_EXACT_SIZES}"),
        ("pinned_max_cached_size_mb:1", "pinned_max_cached_size_mb:1"),
    ],
    ids=["none", "others", "of the user"],
)
def test_pinned_sizes_are_set_beside_other_settings(allocator_settings: None, before: str, after: str) -> None:
    torch._C._accelerator_setAllocatorSettings(before)
    pin_exact_sizes()
    assert torch._C._accelerator_getAllocatorSettings() == after


def test_torch_knows_the_setting_of_pinned_sizes(allocator_settings: None) -> None:
    # It takes any name without a word, and refuses values of names that it knows.
    with pytest.raises(ValueError, match="sto"):
        torch._C._accelerator_setAllocatorSettings(_EXACT_SIZES.replace("4", "x"))
