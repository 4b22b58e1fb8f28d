"""A run that is killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from kill_and_resume import COMMAND, kill_once
from small_task import prime_config, read_curve, write_yaml

PARALLEL = {"world_size": 2, "tensor_model_parallel_size": 2}
NUM_STEPS = 7


def config_of(start: str, directory: Path, name: str) -> Path:
    config = prime_config(
        start,
        str(directory),
        name,
        run={"name": name, "directory": str(directory), "num_steps": NUM_STEPS, "seed": 3},
        parallel=PARALLEL,
        advantage={"process_gate": "auc"},
        # More groups than a batch takes, so that the filter's buffer has to survive too.
        filter={"max_attempts": 3, "min_accuracy": 0.1, "max_accuracy": 0.9},
        rollout={"num_prompts": 8, "num_responses": 4, "max_response_tokens": 32},
        checkpoint={"every_steps": 2, "keep_last": 2},
        evaluation={"every_steps": 3, "num_prompts": 20},
    )
    return write_yaml(directory / f"{name}.yaml", config)


def test_kill_and_resume_is_bit_exact(start: str, tmp_path: Path) -> None:
    whole = config_of(start, tmp_path, "whole")
    subprocess.run([*COMMAND, "train", str(whole)], check=True, capture_output=True, timeout=250)

    broken = ["train", str(config_of(start, tmp_path, "broken"))]
    run = tmp_path / "broken"
    # The first life ends between two steps, the second inside a save, the third before it has done anything new.
    first = kill_once(broken, run, num_steps=3, in_save=False, delay=0.1)
    second = kill_once(broken, run, num_steps=1, in_save=True, delay=0.002)
    third = kill_once(broken, run, num_steps=0, in_save=False, delay=2.0)
    assert first.after_step >= 2 and second.after_step > first.newest and third.newest >= second.newest >= first.newest
    result = subprocess.run([*COMMAND, *broken], check=True, capture_output=True, text=True, timeout=250)
    assert f"resumed after step {third.newest}" in result.stderr

    expected, actual = read_curve(str(tmp_path), "whole"), read_curve(str(tmp_path), "broken")
    assert len(expected) == 1 + NUM_STEPS
    assert actual == expected
    for folder in ("hf", "hf_prm"):
        one, other = ((tmp_path / name / folder / "model.safetensors").read_bytes() for name in ("whole", "broken"))
        assert one == other

    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken")]
    for summary in summaries:
        summary.pop("wall_seconds")
    assert summaries[0] == summaries[1]

    kept = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "broken")]
    assert kept[0] == kept[1] and kept[0][-2:] == ["step_00000006", "step_00000007"]
