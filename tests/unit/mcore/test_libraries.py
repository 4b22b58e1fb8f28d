"""Optional libraries are named where they are missing, and never needed."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.config.schema import ModelSection
from megatron_prime.errors import ConfigError
from megatron_prime.mcore.cpu import megatron_platform

with megatron_platform():
    from megatron_prime.mcore.libraries import choose_libraries

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


def test_a_cpu_has_torch() -> None:
    found = choose_libraries(ModelSection(path=""))
    assert (found.transformer_engine, found.adam) == (False, "torch")
    assert str(found) == "layers of torch, Adam of torch"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (ModelSection(path="", transformer_impl="transformer_engine"), "model.transformer_impl"),
        (ModelSection(path="", dtype="bfloat16", fp8="hybrid"), "model.fp8"),
    ],
)
def test_what_is_demanded_and_missing_is_named(section: ModelSection, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*transformer_engine package; install"):
        choose_libraries(section)
