"""Layouts that fit: how GPUs are written, the fastest first, and why none fits."""

from __future__ import annotations

import pytest
from recipes import H100, ROOT, SHAPES, recipe

from megatron_prime.commands.main import main
from megatron_prime.config import load_config
from megatron_prime.errors import ConfigError
from megatron_prime.planner.plan import make_plan
from megatron_prime.planner.search import hardware_of, search_layouts


@pytest.mark.parametrize(
    ("text", "num_gpus", "per_node", "memory_gib"),
    [("8x80GB", 8, 8, 79.1), ("4x8x80gb", 32, 8, 79.1), ("16x80GB", 16, 8, 79.1), ("4x24GB", 4, 4, 24e9 / 2**30)],
)
def test_gpus_are_read(text: str, num_gpus: int, per_node: int, memory_gib: float) -> None:
    found, machine = hardware_of(text, H100)
    assert (found, machine.num_gpus_per_node) == (num_gpus, per_node)
    assert machine.memory_gib == pytest.approx(memory_gib)


@pytest.mark.parametrize("text", ["8", "8x80", "0x80GB", "x80GB", "8x80GBx2", "many"])
def test_gpus_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        hardware_of(text, H100)


def test_search_finds_what_fits_and_sorts_it() -> None:
    config, architecture = recipe("prime_qwen2.5_32b", "qwen2.5-32b")
    found = search_layouts(config, architecture, H100, 32)
    times = [candidate.plan.step_seconds for candidate in found]
    assert len(found) >= 3 and times == sorted(times)
    for candidate in found:
        assert candidate.plan.fits
        again = load_config(
            ROOT / "configs" / "prime_qwen2.5_32b.yaml",
            [f"model.path={SHAPES / 'qwen2.5-32b'}", *candidate.overrides()],
        )
        assert make_plan(again, architecture, H100).peak_gib == candidate.plan.peak_gib


def test_search_says_by_how_much_nothing_fits() -> None:
    config, architecture = recipe("prime_qwen2.5_72b", "qwen2.5-72b")
    with pytest.raises(ConfigError, match=r"no layout of 8 GPUs fits 79 GiB each; the smallest needs \d+ GiB"):
        search_layouts(config, architecture, H100, 8)


def test_check_prints_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "configs" / "prime_qwen2.5_32b.yaml"), f"model.path={SHAPES / 'qwen2.5-32b'}"]
    assert main(["check", "--shapes-only", "--gpus", "4x8x80GB", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("1. ") and "peak" in lines[0]
    assert "parallel.world_size=32" in lines[1]
