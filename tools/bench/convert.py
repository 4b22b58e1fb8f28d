"""Times converting a checkpoint of about 1 GB each way, beside transformers loading and saving the same model.

The model has the shape of Qwen2.5-0.5B in bfloat16, random. Every measurement is a process of its own; the variants
take turns, the best of each counts, and what comes back must equal the start byte by byte. Memory is the process's peak
resident set, mapped files included, less what it held before it started (libraries). Prints a table and writes
build/bench/convert.json.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.half_billion import CONFIG, TINY_CONFIG, write_folder
from common.measuring import Row, bench_parser, machine, peak_bytes, resident_bytes, write_result


def work_of(variant: str, direction: str, source: Path, target: Path) -> Callable[[], object]:
    """What is timed, with everything imported."""
    if variant == "ours":
        from megatron_prime.weights.conversion import to_hf, to_megatron

        convert = to_megatron if direction == "to-megatron" else to_hf
        return lambda: convert(source, target)
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen2 import modeling_qwen2

    assert modeling_qwen2
    return lambda: AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)


def measure(variant: str, direction: str, source: Path, target: Path) -> Row:
    """One conversion, in this process."""
    work = work_of(variant, direction, source, target)
    libraries = resident_bytes()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "library_bytes": libraries, "peak_bytes": peak_bytes() - libraries}


def run(variant: str, direction: str, source: Path, target: Path) -> Row:
    """One conversion, in a process of its own."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, "--child", variant, direction, str(source), str(target)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def bench(scratch: Path, config: Mapping[str, Any], num_repeats: int) -> list[Row]:
    source, megatron, back = scratch / "source", scratch / "megatron", scratch / "back"
    num_bytes = write_folder(source, config)
    turns = {
        ("ours", "to-megatron"): (source, megatron),
        ("ours", "to-hf"): (megatron, back),
        ("transformers", "load + save"): (source, scratch / "saved"),
    }
    best: dict[tuple[str, str], Row] = {}
    for _ in range(num_repeats):
        for (variant, direction), paths in turns.items():
            row = run(variant, direction, *paths)
            known = best.setdefault((variant, direction), row)
            if row["seconds"] < known["seconds"]:
                best[variant, direction] = row
        assert filecmp.cmp(source / "model.safetensors", back / "model.safetensors", shallow=False)
    return [
        {"variant": variant, "direction": direction, "gb_per_second": num_bytes / 1e9 / row["seconds"], **row}
        for (variant, direction), row in best.items()
    ]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        variant, direction, source, target = options.child
        print(json.dumps(measure(variant, direction, Path(source), Path(target))))
        return
    scratch = options.output / "convert.scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        rows = bench(scratch, *((TINY_CONFIG, 1) if options.tiny else (CONFIG, options.repeats)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{'variant':<14}{'direction':<14}{'seconds':>9}{'GB/s':>7}{'peak MB':>9}{'libraries MB':>14}")
    for row in rows:
        memory = f"{row['peak_bytes'] / 1e6:>9.0f}{row['library_bytes'] / 1e6:>14.0f}"
        print(f"{row['variant']:<14}{row['direction']:<14}{row['seconds']:>9.2f}{row['gb_per_second']:>7.2f}{memory}")
    write_result("convert", machine("one thread"), rows, options)


if __name__ == "__main__":
    main()
