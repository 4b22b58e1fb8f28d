"""A rollout engine of one's own is refused with the reason before anything starts, and a sound one is not built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prime.assembly.contracts.engine import check_engine, problems_with_engine
from megatron_prime.config.schema import RolloutSection

HEAD = "from megatron_prime.interfaces import Engine, EngineSetup\n"
WHOLE = """
class Whole:
    weight_version: int = -1
    def __init__(self, setup): raise SystemExit("built")
    def generate(self, prompts, sampling, on_answer=None): ...
    def load_weights(self, weights, version): ...
    def sleep(self): ...
    def wake(self): ...
    def close(self): ...
"""
Find = Callable[[str, str], list[str]]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """Writes a module with an engine and returns what the check says of it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = 0

    def check(source: str, name: str) -> list[str]:
        nonlocal count
        count += 1
        (tmp_path / f"engine_{tmp_path.name}_{count}.py").write_text(HEAD + WHOLE + source)
        section = RolloutSection(num_prompts=1, engine=f"engine_{tmp_path.name}_{count}:{name}")
        config: Any = SimpleNamespace(rollout=section)
        return check_engine(config)

    return check


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("", "Whole"),
        ("def make(setup) -> Whole: return Whole(setup)", "make"),
        ("def make(setup: EngineSetup) -> 'Engine': raise SystemExit", "make"),
        ("class Child(Whole):\n    def generate(self, *arguments, **options): ...", "Child"),
        ("class Static(Whole):\n    weight_version = property(lambda self: 3)", "Static"),
    ],
)
def test_sound_engines_pass_without_being_built(find: Find, source: str, name: str) -> None:
    assert find(source, name) == []


@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        ("", "absent", "cannot be imported: AttributeError"),
        ("made = 3", "made", "is of type int, not a function"),
        ("def make() -> Whole: ...", "make", "must take one argument, an interfaces.EngineSetup"),
        ("def make(setup, more) -> Whole: ...", "make", "must take one argument"),
        ("def make(setup): return Whole(setup)", "make", "does not say what it makes; annotate its result"),
        ("def make(setup) -> None: ...", "make", "does not say what it makes"),
        ("def make(setup) -> 'Missing': ...", "make", "does not say what it makes"),
        ("class Part(Whole):\n    close = None", "Part", "makes has no close()"),
        (
            "class Part(Whole):\n    def generate(self, prompts): ...",
            "Part",
            "be called as generate(prompts, sam",
        ),
        (
            "class Part(Whole):\n    def load_weights(self, weights, version, device): ...",
            "Part",
            "cannot be called as load_weights(weights, version); see interfaces.Engine",
        ),
    ],
)
def test_broken_engines_are_refused_with_the_reason(find: Find, source: str, name: str, problem: str) -> None:
    (found,) = find(source, name)
    assert found.startswith("rollout.engine: ")
    assert problem in found


def test_everything_that_is_missing_is_said_at_once(find: Find) -> None:
    found = find("class Empty:\n    def __init__(self, setup): ...", "Empty")
    assert len(found) == 6
    assert "weight_version: int = -1" in found[-1]


def test_what_was_made_is_looked_at_too() -> None:
    engine = SimpleNamespace(weight_version=-1, generate=lambda prompts, sampling, on_answer=None: [])
    engine.sleep = engine.wake = engine.close = lambda: None
    engine.load_weights = lambda weights: ""
    (found,) = problems_with_engine("mine:make", engine)
    assert "load_weights of what mine:make makes cannot be called as load_weights(weights, version)" in found
