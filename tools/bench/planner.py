"""Compares the planner's memory with that of real runs: twelve configurations on this machine's CPU.

Every rank is a process that first runs the same configuration with a tiny model (so that all libraries are loaded) and
then the configuration itself. Measured is the peak resident memory in each stage of the second step, which runs log as
`memory/STAGE_gib`, less what a rank held before the second run; planned is what `megatron-prime check` prints for the
stage. The fullest rank counts, as it does in a plan. The C library is told to give large blocks back at once
(MALLOC_MMAP_THRESHOLD_); what it would hoard is no part of the plan. Prints a table and writes
build/bench/planner.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.measuring import ROOT, Row, bench_parser, machine, resident_bytes, write_result

ARITHMETIC = ROOT / "configs" / "models" / "arithmetic"
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 8, "vocab_size": 256}
FEW_LAYERS, MANY_TOKENS, FEW_TOKENS = SHAPE | {"num_hidden_layers": 2, "vocab_size": 1024}, 96, 16
"""The model and the answers of a tiny run are of FEW."""
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "full recomputation": {"model.recompute_granularity": "full"},
    "reference is the policy": {"reference.source": "policy"},
    "outcomes only": {"advantage.process_coef": 0},
    "tied head, Qwen2": {"family": "qwen2"},
    "unpacked rows": {"micro_batch.packed": False, "micro_batch.micro_batch_size": 8},
    "large micro-batches": {"micro_batch.micro_batch_tokens": 2048},
    "2 data": {"parallel.world_size": 2},
    "2 data, distributed optimizer, bfloat16": {
        "parallel.world_size": 2,
        "parallel.use_distributed_optimizer": True,
        "model.dtype": "bfloat16",
    },
    "2 tensor, sequence parallel": {
        "parallel.world_size": 2,
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
    },
    "2 pipeline": {"parallel.world_size": 2, "parallel.pipeline_model_parallel_size": 2},
}
"""What differs from the first one; `family` is the model's."""


def make_model(folder: Path, family: str, shape: Mapping[str, Any]) -> Path:
    """A random model with the arithmetic task's tokenizer, made once."""
    if folder.exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, tie_word_embeddings=family == "qwen2", **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for path in ARITHMETIC.iterdir():
        if "token" in path.name or path.name == "chat_template.jinja":
            shutil.copy(path, folder)
    return folder


def make_config(case: Mapping[str, Any], model: Path, folder: Path, name: str, num_tokens: int) -> dict[str, Any]:
    """The configuration of a case as YAML would have it."""
    config: dict[str, Any] = {
        "run": {"name": name, "directory": str(folder), "num_steps": 2},
        "model": {"path": str(model)},
        "parallel": {},
        "micro_batch": {"micro_batch_tokens": 1024},
        "data": {"kind": "arithmetic"},
        "rollout": {"num_prompts": 4, "num_responses": 4, "max_response_tokens": num_tokens},
        "filter": {"enabled": False},
        "prm": {},
        "reference": {},
        "advantage": {"process_gate": "none"},
        "policy": {},
        "evaluation": {"num_prompts": 0},
        "checkpoint": {"every_steps": 0, "export_hf": False},
    }
    for key, value in case.items():
        if key != "family":
            section, _, field = key.partition(".")
            config[section][field] = value
    if "micro_batch_size" in config["micro_batch"]:
        config["micro_batch"]["micro_batch_tokens"] = None
    return config


def run_rank(scratch: Path, second_port: str) -> int:
    """Both runs on this rank; its bytes before the second one."""
    from megatron_prime.assembly import run as build
    from megatron_prime.config.loader import load_config

    build.run(load_config(scratch / "tiny.yaml"))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    os.environ["MASTER_PORT"] = second_port  # the first run's store may still be there
    before = resident_bytes()
    build.run(load_config(scratch / "case.yaml"))
    return before


def run_case(name: str, scratch: Path, models: Path, measured_shape: Mapping[str, Any], num_tokens: int) -> list[Row]:
    """One configuration: planned and measured bytes by stage."""
    from megatron_prime.config.loader import load_config
    from megatron_prime.planner.hardware import PROFILES
    from megatron_prime.planner.plan import make_plan
    from megatron_prime.weights.architecture import read_architecture

    case = CASES[name]
    family = case.get("family", "llama")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for file, shape in (("tiny", SHAPE | TINY), ("case", measured_shape)):
        model = make_model(models / f"{family}_{file}", family, shape)
        (scratch / f"{file}.yaml").write_text(json.dumps(make_config(case, model, scratch, file, num_tokens)))
    config = load_config(scratch / "case.yaml")
    plan = make_plan(config, read_architecture(config.model.path), PROFILES["cpu"], mean_response_tokens=num_tokens)
    before = run_ranks(name, scratch, config.parallel.world_size)
    metrics = json.loads((scratch / "case" / "metrics.jsonl").read_text().splitlines()[-1])
    rows = []
    for phase in plan.phases:
        measured = metrics[f"memory/{phase.name}_gib"] * 2**30 - before
        rows.append(
            {"variant": "ours", "case": name, "phase": phase.name, "planned": phase.total, "measured": measured}
        )
    return rows


def run_ranks(name: str, scratch: Path, world_size: int) -> float:
    """Runs the ranks of a case; bytes of a rank before it, which differ by less than a MB or two."""
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        port, second_port = (str(probe.getsockname()[1]) for probe in (first, second))
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
        "MALLOC_ARENA_MAX": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", str(scratch), second_port],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(scratch / f"rank_{rank}.log").open("w"),
        )
        for rank in range(world_size)
    ]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"{name} failed:\n{(scratch / 'rank_0.log').read_text()[-2000:]}")
    return statistics.mean(int((scratch / f"rank_{rank}.bytes").read_text()) for rank in range(world_size))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        scratch, second_port = options.child
        before = run_rank(Path(scratch), second_port)
        (Path(scratch) / f"rank_{os.environ['RANK']}.bytes").write_text(str(before))
        return
    rows: list[Row] = []
    scratch = (options.output / "planner.scratch").resolve()
    cases = options.cases[:1] if options.tiny else options.cases
    sizes = (FEW_LAYERS, FEW_TOKENS) if options.tiny else (SHAPE, MANY_TOKENS)
    print(f"{'configuration':<42}{'stage':<15}{'planned MB':>11}{'measured MB':>12}{'ratio':>7}")
    for name in cases:
        for row in run_case(name, scratch / "case", scratch / "models", *sizes):
            rows.append(row)
            ratio = row["planned"] / row["measured"]
            sizes = f"{row['planned'] / 1e6:>11.0f}{row['measured'] / 1e6:>12.0f}{ratio:>7.2f}"
            print(f"{name:<42}{row['phase']:<15}{sizes}", flush=True)
    shutil.rmtree(scratch)
    peaks = {name: max((r for r in rows if r["case"] == name), key=lambda r: r["measured"]) for name in cases}
    ratios = {name: row["planned"] / row["measured"] for name, row in peaks.items()}
    within = [name for name, ratio in ratios.items() if abs(ratio - 1) <= 0.1]
    span = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
    print(f"fullest stage within 10%: {len(within)} of {len(ratios)}; planned / measured {span}")
    write_result("planner", machine("one thread"), rows, options)


if __name__ == "__main__":
    main()
