"""Rooms load only what they may: seen in a fresh interpreter, not only in the import graph."""

import subprocess
import sys


def modules_after_importing(*names: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after importing these modules and all below them."""
    program = (
        "import importlib, pkgutil, sys\n"
        f"for name in {names!r}:\n"
        "    room = importlib.import_module(name)\n"
        "    for module in pkgutil.walk_packages(room.__path__, name + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(' '.join({name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_configuration_needs_no_torch():
    loaded = modules_after_importing("megatron_prime.config")
    assert "megatron_prime" in loaded and "omegaconf" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "megatron"})


def test_loop_and_its_inputs_never_load_megatron_or_vllm():
    rooms = [f"megatron_prime.{room}" for room in ("algorithm", "trainer", "verify", "data", "launch")]
    loaded = modules_after_importing(*rooms)
    assert "megatron_prime" in loaded and "torch" in loaded
    assert loaded.isdisjoint({"megatron", "vllm"})
