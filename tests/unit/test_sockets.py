"""How the name of a part becomes the part, and what is said where it cannot."""

from __future__ import annotations

import importlib
import sys

import pytest

from megatron_prime.errors import ConfigError
from megatron_prime.sockets import BUILT_IN, is_own, names_problem, resolve


def test_every_built_in_name_is_an_import_path_that_leads_somewhere() -> None:
    for key, parts in BUILT_IN.items():
        for name, path in parts.items():
            assert names_problem(key, name) is None and not is_own(key, name)
            # As a path of the user's own would be read.
            assert names_problem(key, path) is None and is_own(key, path)
            assert importlib.util.find_spec(path.partition(":")[0]) is not None, path


def test_short_names_and_import_paths_are_resolved_alike() -> None:
    short = resolve("run.loggers", "tensorboard")
    assert short is resolve("run.loggers", BUILT_IN["run.loggers"]["tensorboard"])
    assert resolve("verifier.factory", "json:dumps")([1]) == "[1]"


@pytest.mark.parametrize(
    ("key", "name", "complaint"),
    [
        (
            "run.loggers",
            "tensorbord",
            r"is not a choice \(did you mean 'tensorboard'\?\); choose one of 'tensorboard', ",
        ),
        ("run.loggers", "csv", r"is not a choice; choose one of .* or name your own as package.module:function$"),
        ("verifier.factory", "grading", "^verifier.factory: 'grading' must be package.module:function$"),
        ("verifier.factory", "my-package:make", "must be package.module:function"),
        ("verifier.factory", "package.module:", "must be package.module:function"),
        (
            "verifier.factory",
            "absent_package:make",
            "No module named 'absent_package'; install it, or put its folder on",
        ),
        ("verifier.factory", "json:dump_all", "cannot be imported: AttributeError: module 'json' has no attribute"),
        ("verifier.factory", "math:pi", "'math:pi' is of type float, not a function"),
    ],
)
def test_what_cannot_be_resolved_is_named_with_its_key(key: str, name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        resolve(key, name)
    assert str(caught.value).startswith(f"{key}: ")


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "half_written.py").write_text("def make(:\n")
    (tmp_path / "divides.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="'half_written:make' cannot be imported: SyntaxError"):
        resolve("data.factory", "half_written:make")
    with pytest.raises(ConfigError, match="'divides:make' cannot be imported: ZeroDivisionError"):
        resolve("data.factory", "divides:make")
    assert "divides" not in sys.modules
