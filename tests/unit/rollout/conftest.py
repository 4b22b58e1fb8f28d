"""The tiny models, made once."""

from collections.abc import Callable
from functools import cache

import pytest
from tiny_engines import TinyModel, make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Returns one of `tiny_engines.CONFIGS` by name."""
    return cache(lambda name: make_tiny_model(name, tmp_path_factory.mktemp(name)))
