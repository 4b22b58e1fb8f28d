"""The choice between torch's float32 products."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.kernels import choose_gemm, gemm

CPU = torch.device("cpu")


def test_a_small_head_is_not_measured(monkeypatch):
    monkeypatch.setattr(gemm, "_seconds", lambda *_: pytest.fail("measured"))
    assert choose_gemm(torch.float32, 1000, 64, CPU) == "mm"
    assert choose_gemm(torch.float64, 100_000, 64, CPU) == "mm"


@pytest.mark.parametrize(("gain", "chosen"), [(1.5, "onednn"), (1.05, "mm"), (0.5, "mm")])
def test_the_faster_product_is_chosen(monkeypatch, gain, chosen):
    times = {gemm._mm_product: gain, gemm._onednn_product: 1.0}
    monkeypatch.setattr(gemm, "_seconds", lambda product, *_: times[product])
    assert choose_gemm(torch.float32, 2**16, 64, CPU) == chosen


def test_a_product_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(gemm, "_onednn_product", lambda left, right: (left @ right).bfloat16().float())
    assert choose_gemm(torch.float32, 2**16, 64, CPU) == "mm"


def test_a_torch_without_onednn_is_no_error(monkeypatch):
    def missing(left, right):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(gemm, "_onednn_product", missing)
    assert choose_gemm(torch.float32, 2**16, 64, CPU) == "mm"


def test_the_measurement_gives_one_of_the_two():
    assert choose_gemm(torch.float32, 2**16, 64, CPU) in ("mm", "onednn")


@pytest.mark.parametrize("name", ["mm", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("half", [True, False])
def test_products_are_exact_to_their_type(monkeypatch, name, dtype, half):
    """With and without bfloat16 instructions."""
    monkeypatch.setattr(gemm, "has_bfloat16_products", lambda: half)
    generator = torch.Generator().manual_seed(0)
    hidden, rows = (torch.randn(n, 32, generator=generator).to(dtype) for n in (20, 50))
    products = gemm.Gemm(name, dtype, CPU)
    exact = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    logits = products.logits(products.prepare(hidden), rows)
    wanted = hidden.double() @ rows.double().T
    assert (logits - wanted).norm() < exact * wanted.norm()
    total = torch.ones(50, 32, dtype=logits.dtype)
    factor = products.round(logits)
    products.accumulate(total, factor.T, hidden)
    wanted = 1 + factor.double().T @ hidden.double()
    assert (total - wanted).norm() < (3e-3 if products.rounds else exact) * wanted.norm()
    assert products.rounds == (half and dtype == torch.bfloat16)
