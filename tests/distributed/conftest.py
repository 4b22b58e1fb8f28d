"""The pool of gloo processes, one per test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_processes import GlooPool
from small_task import make_start


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def start(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that half knows the small task."""
    return gloo_pool.run(1, make_start, str(tmp_path_factory.mktemp("start")))[0]
