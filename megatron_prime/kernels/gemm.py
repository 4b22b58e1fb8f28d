"""The matrix products of the torch backend: logits in full precision, gradients rounded at most once.

Torch sends float32 products on a CPU to MKL, and oneDNN is up to twice as fast on some processors. Which one is
better can only be measured, so a run measures once, where its ranks can agree on the result and store it
(`choose_gemm`). Nothing else in this module measures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch

logger = logging.getLogger(__name__)

GemmName = Literal["mm", "onednn"]

_WORTH_MEASURING = 2**22
"""Elements of a head: smaller ones take milliseconds either way."""
_NOTICEABLY_FASTER = 1.1
_PROBE_TOKENS, _PROBE_ROWS = 256, 1024


class Gemm:
    """Matrix products of one head.

    Args:
        name: of the float32 product on a CPU.
        dtype: of hidden states and weight.
        device: where they are.
    """

    def __init__(self, name: GemmName, dtype: torch.dtype, device: torch.device) -> None:
        onednn = name == "onednn" and device.type == "cpu" and dtype != torch.float64
        self._product = _onednn_product if onednn else _mm_product
        self._cuda_half = dtype == torch.bfloat16 and device.type == "cuda"
        # Emulated bfloat16 products would be slower than float32 ones.
        self._cpu_half = dtype == torch.bfloat16 and device.type == "cpu" and has_bfloat16_products()
        self._accumulator = accumulator_dtype(dtype)

    @property
    def rounds(self) -> bool:
        """True if `accumulate` multiplies bfloat16 numbers."""
        return self._cuda_half or self._cpu_half

    def prepare(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the type that `logits` multiplies; once per block of tokens."""
        return hidden if self._cuda_half else hidden.to(self._accumulator)

    def logits(self, prepared: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Prepared hidden states [t, d] times rows of the head [v, d]: [t, v] with full precision."""
        if self._cuda_half:
            return torch.mm(prepared, rows.T, out_dtype=torch.float32)
        return self._product(prepared, rows.to(self._accumulator).T)

    def round(self, grad_logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits as `accumulate` multiplies it: the one rounding of a bfloat16 head."""
        return grad_logits.to(torch.bfloat16) if self.rounds else grad_logits

    def accumulate(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds left [m, k] times right [k, n] to a float32 (float64) total."""
        if self._cuda_half:
            total.add_(torch.mm(left, right, out_dtype=torch.float32))
        elif self._cpu_half:
            total.add_(left @ right)
        elif self._product is _mm_product:
            total.addmm_(left, right.to(total.dtype))
        else:
            total.add_(self._product(left, right.to(total.dtype)))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of logits, statistics and sums for inputs of a type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_bfloat16_products() -> bool:
    """Returns whether the processor has bfloat16 matrix instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_gemm(dtype: torch.dtype, num_rows: int, hidden_size: int, device: torch.device) -> GemmName:
    """Measures which float32 product is faster here. Takes about 0.1 s, or nothing where it cannot matter.

    Timings scatter, and the products differ in their last bits: call it once per run, on one rank, and give the
    answer to all others and to resumed runs.

    Args:
        dtype: of the head.
        num_rows: of the head on one rank.
        hidden_size: columns of the head.
        device: where it is.

    Returns:
        `onednn` where it computes the same and is at least a tenth faster in all three products, else `mm`.
    """
    if device.type != "cpu" or dtype == torch.float64 or num_rows * hidden_size < _WORTH_MEASURING:
        return "mm"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_PROBE_TOKENS, hidden_size, generator=generator)
    rows = torch.randn(_PROBE_ROWS, hidden_size, generator=generator)
    logits = torch.randn(_PROBE_TOKENS, _PROBE_ROWS, generator=generator)
    pairs = [(hidden, rows.T), (logits, rows), (logits.T, hidden)]
    try:
        agree = all(_agree(left, right) for left, right in pairs)
    except (AttributeError, RuntimeError) as error:
        logger.info("torch has no oneDNN product that works here (%s)", error)
        return "mm"
    if not agree:
        logger.warning("oneDNN's float32 product is not a float32 product here; torch.mm is used")
        return "mm"
    gains = [_seconds(_mm_product, *pair) / _seconds(_onednn_product, *pair) for pair in pairs]
    logger.info("float32 products of the head: oneDNN takes 1/%.2f of torch.mm's time at the least", min(gains))
    return "onednn" if min(gains) >= _NOTICEABLY_FASTER else "mm"


def _mm_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right


def _onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


def _agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    exact = left.double() @ right.double()
    errors = [(product(left, right) - exact).norm() / exact.norm() for product in (_mm_product, _onednn_product)]
    return bool(errors[1] < 2e-6 + 2 * errors[0])


def _seconds(product: Callable[..., torch.Tensor], left: torch.Tensor, right: torch.Tensor) -> float:
    """Shortest of a few runs, the first of which only warms up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        product(left, right)
        times.append(time.perf_counter() - start)
    return min(times[1:])
