"""A few seconds of tools/fuzz_verifiers.py, always the same."""

import importlib.util
from pathlib import Path

import pytest

from megatron_prime.verify.code.sandbox.launch import SandboxError
from megatron_prime.verify.code.worker import make_launcher
from megatron_prime.verify.routing import build_verifier

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz_verifiers.py"


def test_a_verdict_comes_out_whatever_comes_in() -> None:
    try:
        make_launcher("fork_server", 2**30).close()
    except SandboxError as error:
        pytest.skip(f"no namespaces on this machine: {error}")
    specification = importlib.util.spec_from_file_location("fuzz_verifiers", TOOL)
    assert specification is not None and specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    with build_verifier(tool.SECTION, ["math", "code"]) as verifier:
        statuses = tool.fuzz(verifier, 1, num_batches=40)
    assert statuses.total() >= 40 * tool.BATCH and len(statuses) >= 8
