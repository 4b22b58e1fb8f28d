"""How far a run has come."""

from __future__ import annotations

from pathlib import Path

from megatron_prime.launch.newest_step import newest_step

ROOT = Path(__file__).resolve().parents[3]


def test_progress_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}", "run.name=r"]
    config = str(ROOT / "configs" / "arithmetic.yaml")
    assert newest_step(config, overrides) == -1
    for name in ("step_00000010", "step_00000020", "step_00000030.writing", "step_00000040.damaged"):
        (tmp_path / "r" / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(config, overrides) == 20
