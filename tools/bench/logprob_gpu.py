"""Times the log-prob op on one GPU: heads of 7B, 32B and 72B models, whole and as shards of TP 4 and 8, beside peers.

Reports time, TFLOP/s, the share of the floor (three or four matrix products at the rate that cuBLAS reaches on the
card), peak memory and error against float64. A few minutes on one card. Writes build/bench/logprob_gpu.json. Ends with
status 77 where there is no GPU; `--tiny --host` runs every line of it on tiny shapes on the CPU, to show that it works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common.logprob_variants import VARIANTS, NotHere, Problem, errors_against_float64, ours_forward_only
from common.measuring import bench_parser, exit_without_gpu, write_result
from rich.console import Console
from rich.table import Table

from megatron_prime.kernels import HeadOptions

VOCAB_SIZE = 152064
HEADS = {"7B": 3584, "32B": 5120, "72B": 8192}
TINY_HEADS = {"tiny": 48}
# Products of 2 T d V that each variant makes at least.
PRODUCTS = {"ours": 3, "ours, loss entry": 3, "ours, forward only": 1}
RUNS: dict[str, Callable[[Problem], torch.Tensor]] = VARIANTS | {"ours, forward only": ours_forward_only}
REPEATS = 3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def best_seconds(device: str, run: Callable[[], Any]) -> float:
    """Shortest of a few runs after a first one that compiles and warms up."""
    run()
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product."""
    size = 8192 if device == "cuda" else 256
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(device, lambda: left @ right)


def measure(name: str, problem: Problem, device: str, rate: float) -> dict[str, Any]:
    """One variant on one shape."""
    shape = len(problem.targets), *problem.weight.shape
    row: dict[str, Any] = {"variant": name, "tokens": shape[0], "vocab_rows": shape[1], "hidden_size": shape[2]}

    def run() -> torch.Tensor:
        problem.hidden.grad = problem.weight.grad = None
        return RUNS[name](problem)

    try:
        logprobs = run()
        errors = errors_against_float64(problem, logprobs, 32)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = best_seconds(device, run)
    except NotHere as reason:
        return row | {"not_run": str(reason)}
    except torch.OutOfMemoryError:
        return row | {"not_run": "out of memory"}
    if device == "cuda":
        row["extra_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    operations = 2 * shape[0] * shape[1] * shape[2] * PRODUCTS.get(name, 3)
    return (
        row
        | errors
        | {
            "seconds": seconds,
            "tflops_per_second": operations / seconds / 1e12,
            "share_of_floor": operations / rate / seconds,
        }
    )


def main() -> None:
    """Runs every shape and variant, prints one table and writes it as JSON."""
    parser = bench_parser(__doc__)
    parser.add_argument("--host", action="store_true", help="on the CPU: shows that it runs")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--variants", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--workspace-mib", type=float, default=1024)
    arguments = parser.parse_args()
    device = "cpu" if arguments.host else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        exit_without_gpu()
    heads = TINY_HEADS if arguments.tiny else {name: HEADS[name] for name in arguments.heads}
    vocab_size = 400 if arguments.tiny else VOCAB_SIZE
    token_counts = [64] if arguments.tiny else [8192, 32768]
    dtype = torch.bfloat16
    rate = product_rate(device, dtype)
    options = HeadOptions(workspace_bytes=int(arguments.workspace_mib * 2**20))
    rows: list[dict[str, Any]] = []
    for head, size in heads.items():
        for shards in (1, 4, 8):
            problem = Problem.random(max(token_counts), size, vocab_size // shards, dtype, device, options)
            problem.weight.main_grad = torch.zeros(problem.weight.shape, device=device)  # type: ignore[attr-defined]
            for num_tokens in token_counts:
                part = replace(
                    problem,
                    hidden=problem.hidden.detach()[:num_tokens].requires_grad_(),
                    targets=problem.targets[:num_tokens],
                    upstream=problem.upstream[:num_tokens],
                )
                for name in arguments.variants:
                    rows.append({"head": head, "shards": shards} | measure(name, part, device, rate))
            del problem
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report(rows, machine, rate)
    write_result("logprob_gpu", machine, rows, arguments, product_rate=rate)


def report(rows: list[dict[str, Any]], machine: str, rate: float) -> None:
    """Prints the table."""
    table = Table(title=f"Log-prob head on {machine}, bfloat16, products at {rate / 1e12:.0f} TFLOP/s")
    for column in ("head", "TP", "T", "variant", "ms", "TFLOP/s", "of floor", "extra GiB", "log-prob err", "grad err"):
        table.add_column(column)
    for row in rows:
        start = (row["head"], str(row["shards"]), str(row["tokens"]), row["variant"])
        if "not_run" in row:
            table.add_row(*start, row["not_run"][:40])
            continue
        table.add_row(
            *start,
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['tflops_per_second']:.0f}",
            f"{row['share_of_floor']:.0%}",
            f"{row['extra_gib']:.2f}" if "extra_gib" in row else "-",
            *(f"{row[key]:.1e}" if row[key] is not None else "-" for key in ("logprob_error", "gradient_error")),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
