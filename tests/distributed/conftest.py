"""The pool of gloo processes, one per test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_processes import GlooPool


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()
