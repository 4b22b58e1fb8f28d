"""Names of parts: what is built in can be imported, and what cannot be found is told with the fix."""

from __future__ import annotations

import pytest

from megatron_prime.errors import ConfigError
from megatron_prime.sockets import BUILT_IN, is_own, names_problem, resolve

ENTRIES = [(key, name) for key, names in BUILT_IN.items() for name in names]


@pytest.mark.parametrize(("key", "name"), ENTRIES)
def test_everything_built_in_can_be_imported_and_is_documented(key: str, name: str) -> None:
    part = resolve(key, name)
    assert callable(part) and (part.__doc__ or "").strip()
    assert not is_own(key, name) and names_problem(key, name) is None


def test_a_part_of_ones_own_is_found_by_its_path() -> None:
    assert resolve("policy.loss", "math:hypot")(3.0, 4.0) == 5.0
    assert is_own("policy.loss", "math:hypot")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ppo_klip", r"policy.loss: 'ppo_klip' is not a choice \(did you mean 'ppo_clip'\?\)"),
        ("math", "or name your own as package.module:function"),
        ("math:", "not a choice"),
        ("my package:f", "not a choice"),
        ("math:no_such_function", "cannot be imported: AttributeError"),
        ("no_such_package:f", "cannot be imported: ModuleNotFoundError"),
        ("math:pi", "is of type float, not a function"),
    ],
)
def test_what_is_no_part_is_refused_with_the_reason(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolve("policy.loss", name)
