"""What the parts of a run are to each other: the package's own classes have what the protocols ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, get_type_hints

import pytest

from megatron_prime import interfaces
from megatron_prime.interfaces import DropCounts

PARTS = {
    "Policy": ["mcore.prime_roles:PolicyRole"],
    "Reference": ["mcore.prime_roles:ReferenceRole"],
    "RewardModel": ["mcore.prime_roles:PrmRole"],
    "Imitator": ["mcore.prime_roles:SftRole"],
    "ExportedWeights": ["weights.stream:WeightExport", "weights.folder_export:FolderExport"],
    "Engine": [
        "rollout.embedded.engine:TransformersEngine",
        "rollout.vllm.trainer.beside:VllmBeside",
        "rollout.vllm.trainer.remote:VllmServers",
    ],
    "Verifier": [
        "verify.routing:RoutingVerifier",
        "verify.math.verifier:MathVerifier",
        "verify.code.verifier:CodeVerifier",
    ],
    "PromptSource": ["data.arithmetic:ArithmeticPrompts", "data.files:FilePrompts"],
    "SftSource": ["data.arithmetic:ArithmeticSft", "data.files:FileSft"],
    "Checkpoints": ["mcore.checkpoint.checkpointer:Checkpointer"],
    "FailedUpdates": ["observe.failed_updates:FailedUpdateFiles"],
    "Logger": ["observe.metrics:RunLog"],
}


def pairs() -> list[tuple[str, str]]:
    return [(protocol, part) for protocol, parts in PARTS.items() for part in parts]


def members(protocol: type) -> dict[str, Any]:
    """What a protocol asks for, with what it inherits."""
    found: dict[str, Any] = {}
    for base in reversed(protocol.__mro__):
        if getattr(base, "_is_protocol", False) and base.__module__ == interfaces.__name__:
            found |= {n: m for n, m in vars(base).items() if callable(m) or isinstance(m, property)}
    return {n: m for n, m in found.items() if n == "__iter__" or n == "__len__" or not n.startswith("_")}


def accepts(given: Callable[..., Any], asked: Callable[..., Any]) -> str | None:
    """Why a method cannot be called as the protocol says; None: it can."""
    wanted = list(inspect.signature(asked).parameters.values())[1:]
    have = inspect.signature(given).parameters
    flexible = any(p.kind is p.VAR_KEYWORD for p in have.values())
    for parameter in wanted:
        found = have.get(parameter.name)
        if found is None and not flexible:
            return f"does not take {parameter.name}"
        if found is not None and parameter.default is not parameter.empty and found.default is found.empty:
            return f"needs {parameter.name}, which callers may leave out"
    more = [p for p in list(have.values())[1:] if p.name not in {w.name for w in wanted}]
    required = [p.name for p in more if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return f"needs {required} beyond what callers give" if required else None


@pytest.mark.parametrize(("protocol", "part"), pairs())
def test_every_part_can_be_used_as_its_protocol_says(protocol: str, part: str) -> None:
    module, _, name = part.partition(":")
    kind = getattr(import_module(f"megatron_prime.{module}"), name)
    asked = members(getattr(interfaces, protocol))
    assert asked
    for member, wanted in asked.items():
        if isinstance(wanted, property):
            # Some have it as a field that their constructor sets.
            assert member in inspect.getsource(kind) or hasattr(kind, member), f"{part} has no {member}"
            continue
        given = getattr(kind, member, None)
        assert callable(given), f"{part} has no {member}"
        assert accepts(given, wanted) is None, f"{part}.{member} {accepts(given, wanted)}"


class Asked:
    """What a caller may do."""

    def work(self, batch: int, *, seed: int = 0) -> int: ...


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (lambda self, batch, *, seed=0: 1, None),
        (lambda self, batch, *, seed=0, more=1: 1, None),
        (lambda self, batch, **anything: 1, None),
        (lambda self, batches, *, seed=0: 1, "does not take batch"),
        (lambda self, batch, *, seed: 1, "needs seed, which callers may leave out"),
        (lambda self, batch, rows, *, seed=0: 1, "needs ['rows'] beyond what callers give"),
    ],
)
def test_methods_that_cannot_be_called_as_was_said_are_found(given: Callable[..., Any], complaint: str | None) -> None:
    assert accepts(given, Asked.work) == complaint


def test_every_protocol_that_has_a_part_in_the_package_is_looked_at() -> None:
    protocols = {n for n, kind in vars(interfaces).items() if getattr(kind, "_is_protocol", False)}
    own = {n for n in protocols if getattr(interfaces, n).__module__ == interfaces.__name__}
    # `Resident` is a part of the models' protocols; loggers are functions' results, tried in tests/unit/observe.
    assert own - PARTS.keys() <= {"Resident", "MetricsLogger"}


def test_annotations_of_the_protocols_can_be_read() -> None:
    """An engine of the user's own is checked by them (assembly/contracts/engine.py)."""
    for name in ("generate", "load_weights"):
        assert get_type_hints(getattr(interfaces.Engine, name))["return"]


def test_what_a_source_leaves_out_is_counted_and_explained() -> None:
    counts = DropCounts(num_rows=10, by_reason={"too_long": 2, "no_answer": 1})
    assert counts.num_dropped == 3
    assert str(counts) == ("2 with prompts of more than data.max_prompt_tokens; 1 without an answer to check against")
    assert str(DropCounts(num_rows=10)) == "nothing"
