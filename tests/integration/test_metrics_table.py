"""Real runs log exactly what docs/reference/metrics.md lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_task import DATA, prime_config, run_prime, write_yaml

from megatron_prime.assembly.run import run
from megatron_prime.config.loader import load_config
from megatron_prime.observe.metric_names import GROUPS, STAGES, metric_of

NEEDS_A_GPU = {"memory/<stage>_gpu_gib"}


def logged(folder: Path) -> set[str]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name for row in rows for name in row} - {"step"}


@pytest.fixture(scope="module")
def names(start: str, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a PRIME run with everything on and a supervised run log."""
    folder = tmp_path_factory.mktemp("runs")
    everything = prime_config(
        start,
        str(folder),
        "prime",
        run={"num_steps": 2},
        advantage={"process_gate": "auc"},
        policy={"kl_coef": 0.01, "importance_cap": 2.0, "dual_clip": 3.0},
        evaluation={"every_steps": 1, "num_prompts": 8},
        checkpoint={"every_steps": 1},
    )
    run_prime(everything)
    supervised = {
        "kind": "sft",
        "run": {"name": "sft", "directory": str(folder), "num_steps": 2, "plots": False},
        "model": {"path": start},
        "data": DATA,
        "sft": {"batch_size": 4, "log_every_steps": 1, "optimizer": {"lr": 1e-4}},
        "checkpoint": {"every_steps": 1},
    }
    run(load_config(write_yaml(folder / "sft.yaml", supervised)))
    return logged(folder / "prime") | logged(folder / "sft")


def test_every_logged_metric_is_in_the_table(names: set[str]) -> None:
    assert {name for name in names if metric_of(name) is None} == set()


def test_every_row_of_the_table_is_logged(names: set[str]) -> None:
    seen = {row.name for name in names if (row := metric_of(name))}
    assert {row.name for rows in GROUPS.values() for row in rows} - seen == NEEDS_A_GPU


def test_every_stage_of_the_table_is_logged(names: set[str]) -> None:
    assert {stage for stage in STAGES if f"time/{stage}_seconds" not in names} == set()
