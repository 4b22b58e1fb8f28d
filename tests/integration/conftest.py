"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_prime.rollout.vllm.trainer.process import EngineParent


@pytest.fixture(scope="session")
def parent() -> Iterator[EngineParent]:
    """Imports vLLM once for all engines beside the tests."""
    parent = EngineParent(1, (), 120.0)
    yield parent
    parent.close()
