"""Optional libraries are named where they are missing, and never needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch
from packaging.version import Version

from megatron_prime.config.schema import ModelSection
from megatron_prime.errors import ConfigError
from megatron_prime.mcore.cpu import megatron_platform

with megatron_platform():
    from megatron.core import utils as megatron_utils

    from megatron_prime.mcore.libraries import choose_libraries

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Lets the choice see a GPU and packages that this machine does not have."""

    def has(capability: tuple[int, int], *packages: str, transformer_engine: str = "2.11.0") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        found = {name: ModuleSpec(name, None) for name in ("transformer_engine", *packages)}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        monkeypatch.setattr(megatron_utils, "_te_version", Version(transformer_engine))

    return has


def test_a_cpu_has_torch() -> None:
    found = choose_libraries(ModelSection(path=""), packed=True)
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
        choose_libraries(section, packed=True)


@pytest.mark.parametrize(
    ("capability", "packages", "dtype", "packed", "expected"),
    [
        ((9, 0), (), "bfloat16", True, True),
        ((8, 0), (), "bfloat16", False, True),
        ((8, 0), ("flash_attn",), "bfloat16", True, True),
        # Its attention would keep all scores: cuDNN's takes no packed sequences here.
        ((8, 0), (), "bfloat16", True, False),
        # Its matrix products would be TF32.
        ((9, 0), ("flash_attn",), "float32", True, False),
    ],
)
def test_auto_takes_transformer_engine_where_it_is_better(
    machine: Machine, capability: tuple[int, int], packages: tuple[str, ...], dtype, packed: bool, expected: bool
) -> None:
    machine(capability, *packages)
    found = choose_libraries(ModelSection(path="", dtype=dtype), packed=packed)
    assert found.transformer_engine == expected
    assert ("flash-attn" in str(found)) == (not expected and dtype == "bfloat16")


def test_packed_sequences_on_an_a100_name_what_they_need(machine: Machine) -> None:
    section = ModelSection(path="", dtype="bfloat16", transformer_impl="transformer_engine")
    machine((8, 0))
    with pytest.raises(ConfigError, match=r"model.transformer_impl.*install flash-attn"):
        choose_libraries(section, packed=True)
    machine((8, 0), "flash_attn")
    assert choose_libraries(section, packed=True).transformer_engine
    # A choice in so many words is heeded, however slow.
    machine((9, 0))
    section = ModelSection(path="", transformer_impl="transformer_engine")
    assert choose_libraries(section, packed=True).transformer_engine


def test_fp8_needs_a_gpu_and_a_transformer_engine_that_can(machine: Machine) -> None:
    section = ModelSection(path="", dtype="bfloat16", fp8="hybrid")
    machine((9, 0))
    assert choose_libraries(section, packed=True).transformer_engine
    machine((9, 0), transformer_engine="2.1.0")
    with pytest.raises(ConfigError, match=r"model.fp8.* needs transformer_engine 2.2 or later, found 2.1.0"):
        choose_libraries(section, packed=True)
    machine((8, 0), "flash_attn")
    with pytest.raises(ConfigError, match=r"model.fp8.* compute capability 8.9"):
        choose_libraries(section, packed=True)
