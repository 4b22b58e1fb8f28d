"""Times the log-prob op on the CPU beside what a user would otherwise call: forward and backward, Qwen2.5-0.5B's head.

Every variant runs in a process of its own, all of them in turn, `--repeats` times; the best counts. Prints a table and
writes build/bench/logprob.json. Peers are used where they can be imported (`--peers DIR` is a folder that
`pip install --target DIR` has filled).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common.logprob_variants import VARIANTS, NotHere, Problem, errors_against_float64
from common.measuring import bench_parser, machine, peak_bytes, reset_peak, resident_bytes, write_result
from rich.console import Console
from rich.table import Table

from megatron_prime.kernels import HeadOptions, choose_gemm
from megatron_prime.kernels.gemm import Gemm

TINY_VARIANTS = ["naive log_softmax", "F.linear_cross_entropy", "ours", "floor"]
"""A tiny run starts a process for each of these only; `logprob_gpu.py --tiny --host` runs all."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One variant, once, in this process."""
    sys.path[:0] = arguments.peers
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    gemm = choose_gemm(dtype, arguments.vocab_size, arguments.hidden_size, torch.device("cpu"))
    if arguments.variant == "floor":
        return floor(arguments, dtype, gemm)
    options = HeadOptions(backend="torch", gemm=gemm, workspace_bytes=int(arguments.workspace_mib * 2**20))
    shape = arguments.tokens, arguments.hidden_size, arguments.vocab_size
    problem = Problem.random(*shape, dtype, "cpu", options)
    if arguments.variant == "ours":
        # Megatron's buffer exists before the step and holds something.
        problem.weight.main_grad = torch.ones(problem.weight.shape)  # pyright: ignore[reportAttributeAccessIssue]
    reset_peak()
    before = resident_bytes()
    start = time.perf_counter()
    try:
        logprobs = VARIANTS[arguments.variant](problem)
    except NotHere as reason:
        return {"variant": arguments.variant, "not_run": str(reason)}
    seconds = time.perf_counter() - start
    result = {"variant": arguments.variant, "seconds": seconds, "extra_gib": (peak_bytes() - before) / 2**30}
    return result | errors_against_float64(problem, logprobs, 64)


def floor(arguments: argparse.Namespace, dtype: torch.dtype, gemm: Any) -> dict[str, Any]:
    """The op's three and four matrix products and nothing else, from the rate on one tile."""
    rows = min(1024, arguments.vocab_size)
    hidden = torch.randn(arguments.tokens, arguments.hidden_size).to(dtype)
    weight = torch.randn(rows, arguments.hidden_size).to(dtype)
    products = Gemm(gemm, dtype, torch.device("cpu"))
    prepared = products.prepare(hidden)
    logits = products.logits(prepared, weight)
    rounded = products.round(logits)
    grad_hidden, grad_weight = (torch.zeros(t.shape) for t in (hidden, weight))

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times) * arguments.vocab_size / rows

    forward = best(lambda: products.logits(prepared, weight))
    backward = best(lambda: products.accumulate(grad_hidden, rounded, weight)) + best(
        lambda: products.accumulate(grad_weight, rounded.T, hidden)
    )
    operations = 6 * arguments.tokens * arguments.hidden_size * arguments.vocab_size
    return {
        "variant": "floor",
        "gemm": gemm,
        "seconds": forward + backward,
        "seconds_four_products": 2 * forward + backward,
        "gflops_per_second": operations / (forward + backward) / 1e9,
    }


def main() -> None:
    """Runs every variant in its own process and reports."""
    parser = bench_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--workspace-mib", type=float, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--variant", choices=[*VARIANTS, "floor"], help="run only this, in this process")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.tokens, arguments.hidden_size, arguments.vocab_size, arguments.repeats = 512, 32, 8000, 1
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    names = TINY_VARIANTS if arguments.tiny else [*VARIANTS, "floor"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    rows = [min(results, key=lambda row: row.get("seconds", 0.0)) for results in found.values()]
    where = machine(f"{arguments.threads} thread(s)", arguments.dtype)
    report(rows, where, arguments)
    write_result("logprob", where, rows, arguments)


def report(rows: list[dict[str, Any]], machine: str, arguments: argparse.Namespace) -> None:
    """Prints the table."""
    naive, lowest = rows[0], rows[-1]
    shape = f"T={arguments.tokens} d={arguments.hidden_size} V={arguments.vocab_size}"
    table = Table(title=f"Log-prob head, forward and backward, {shape}, {machine}")
    for column in ("variant", "seconds", "naive /", "extra GiB", "of naive", "log-prob error", "gradient error"):
        table.add_column(column)
    for row in rows[:-1]:
        if "not_run" in row:
            table.add_row(row["variant"], "not run:", row["not_run"][:60])
            continue
        errors = [row["logprob_error"], row["gradient_error"]]
        table.add_row(
            row["variant"],
            f"{row['seconds']:.2f}",
            f"{naive['seconds'] / row['seconds']:.2f}",
            f"{row['extra_gib']:.2f}",
            f"{row['extra_gib'] / naive['extra_gib']:.2f}",
            *("-" if error is None else f"{error:.1e}" for error in errors),
        )
    table.add_row("floor: 3 products", f"{lowest['seconds']:.2f}", f"{naive['seconds'] / lowest['seconds']:.2f}")
    four = lowest["seconds_four_products"]
    table.add_row("floor: 4 products", f"{four:.2f}", f"{naive['seconds'] / four:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"products by {lowest['gemm']}, {lowest['gflops_per_second']:.0f} GFLOP/s in the floor")


if __name__ == "__main__":
    main()
