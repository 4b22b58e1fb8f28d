"""What a plan says of itself."""

from __future__ import annotations

import re

from recipes import H100, ROOT, recipe

from megatron_prime.config import load_config
from megatron_prime.planner.hardware import PROFILES
from megatron_prime.planner.plan import make_plan
from megatron_prime.planner.plan_text import plan_rows
from megatron_prime.weights.architecture import read_architecture


def test_a_plan_speaks_of_its_own_machine() -> None:
    config, architecture = recipe("prime_qwen2.5_72b", "qwen2.5-72b")
    rows = dict(plan_rows(config, make_plan(config, architecture, H100)))
    assert {"GPU memory peak", "sent per GPU"} <= rows.keys()
    assert " 4 checkpoints of " in rows["disk"]
    assert re.fullmatch(r"about [\d.]+ hours, \d,\d\d0 process hours, evaluations not counted", rows["run time"])
    folder = ROOT / "configs" / "models" / "arithmetic"
    for num_steps, unit in ((1, "seconds"), (300, "minutes"), (300_000, "hours")):
        small = load_config(
            ROOT / "configs" / "arithmetic.yaml", [f"model.path={folder}", f"run.num_steps={num_steps}"]
        )
        rows = dict(plan_rows(small, make_plan(small, read_architecture(folder), PROFILES["cpu"])))
        assert "memory peak" in rows and "sent per process" in rows and not any("GPU" in subject for subject in rows)
        assert re.fullmatch(rf"about [\d.,]+ {unit}, [\d.,]+ process {unit}, evaluations not counted", rows["run time"])
        assert (" 1 checkpoint of " in rows["disk"]) == (num_steps == 1)
