"""The supervised loop and the timing of stages."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from scripted_parts import MemoryCheckpoints, MemoryLogger

from megatron_prime.batch import SftExample
from megatron_prime.config.schema import (
    ArithmeticData,
    CheckpointSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    SftConfig,
    SftSection,
)
from megatron_prime.errors import RunInterrupted
from megatron_prime.trainer.sft import SftTrainer
from megatron_prime.trainer.stages import Stages


def test_stages_add_up_and_start_anew() -> None:
    announced: list[str] = []
    entered: list[tuple[str, int]] = []
    stages = Stages(announced.append, lambda phase, step: entered.append((phase, step)))
    stages.step = 3
    for name, seconds in (("rollout", 0.02), ("score", 0.01), ("rollout", 0.03)):
        with stages(name):
            time.sleep(seconds)
    assert announced == ["rollout", "score", "rollout"]
    assert entered == [(phase, 3) for name in announced for phase in (name, "step")]
    metrics = stages.drain()
    times = {"time/rollout_seconds", "time/score_seconds", "time/step_seconds"}
    assert times == {key for key in metrics if key.startswith("time/")}
    assert metrics["time/rollout_seconds"] >= 0.05
    assert metrics["time/score_seconds"] >= 0.01
    # The step also has the time between its stages.
    assert metrics["time/step_seconds"] >= metrics["time/rollout_seconds"] + metrics["time/score_seconds"]
    rest = stages.drain()
    assert rest.keys() == {"time/step_seconds"}
    assert rest["time/step_seconds"] < 0.01


PEAKS = """
from megatron_prime.trainer.stages import Stages

stages = Stages(lambda name: None)
for name, num_mib in (("large", 256), ("small", 8)):
    with stages(name):
        # 1, because memory that was only promised takes no room.
        block = bytearray(b"\\1") * (num_mib * 2**20)
        del block
metrics = stages.drain()
print(metrics["memory/large_gib"] - metrics["memory/small_gib"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_each_stage_has_its_own_peak_of_memory() -> None:
    # In a process of its own: garbage of other tests that goes in between would hide the difference.
    result = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    assert 0.2 < float(result.stdout) < 0.3


def test_a_stage_that_fails_is_timed_too() -> None:
    stages = Stages(lambda name: None)
    with pytest.raises(KeyError), stages("score"):
        time.sleep(0.01)
        raise KeyError
    assert stages.drain()["time/score_seconds"] >= 0.01


class CountedExamples:
    """Example ``n`` answers with the token ``n``."""

    def take(self, position: int, count: int) -> list[SftExample]:
        return [SftExample(prompt_token_ids=(1,), response_token_ids=(n,)) for n in range(position, position + count)]


class RecordingImitator:
    """Remembers what it was trained on; its loss is the number of updates before."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def update(self, examples: Sequence[SftExample]) -> dict[str, float]:
        self.batches.append([example.response_token_ids[0] for example in examples])
        return {"loss": float(len(self.batches) - 1), "lr": 0.1}


def sft_config(num_steps: int) -> SftConfig:
    return SftConfig(
        run=RunSection(name="sft", num_steps=num_steps),
        model=ModelSection(path="none"),
        data=ArithmeticData(),
        sft=SftSection(batch_size=3, log_every_steps=2, optimizer=OptimizerSection(lr=0.1)),
        checkpoint=CheckpointSection(every_steps=2),
    )


def test_sft_takes_every_example_once_logs_and_saves() -> None:
    model, checkpoints, logger = RecordingImitator(), MemoryCheckpoints(), MemoryLogger()
    summary = SftTrainer(sft_config(5), model, CountedExamples(), checkpoints, logger).train()
    assert model.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert {step: row["sft/loss"] for step, row in logger.rows.items()} == {2: 1.0, 4: 3.0, 5: 4.0}
    assert "time/update_seconds" in logger.rows[2]
    assert sorted(checkpoints.saved) == [2, 4, 5] and checkpoints.awaited == {5}
    assert checkpoints.in_background == {2, 4}
    assert (summary["num_steps"], summary["final_loss"]) == (5, 4.0)


def test_sft_resumes_with_the_next_examples() -> None:
    checkpoints = MemoryCheckpoints()
    SftTrainer(sft_config(2), RecordingImitator(), CountedExamples(), checkpoints, MemoryLogger()).train()
    model, logger = RecordingImitator(), MemoryLogger()
    SftTrainer(sft_config(4), model, CountedExamples(), checkpoints, logger).train()
    assert model.batches == [[6, 7, 8], [9, 10, 11]]
    assert list(logger.rows) == [4]


def test_a_finished_sft_run_reports_again_without_training() -> None:
    checkpoints, model = MemoryCheckpoints(), RecordingImitator()
    first = SftTrainer(sft_config(2), model, CountedExamples(), checkpoints, MemoryLogger()).train()
    again = SftTrainer(sft_config(2), model, CountedExamples(), checkpoints, MemoryLogger()).train()
    assert len(model.batches) == 2
    assert (again["num_steps"], again["final_loss"]) == (2, first["final_loss"]) == (2, 1.0)
    assert again["wall_seconds"] > 0


class InterruptedCheckpoints(MemoryCheckpoints):
    """Somebody asks the run to stop while it is saved."""

    asked = False

    def save(self, step: int, trainer_state: Mapping[str, Any], **options: Any) -> None:
        super().save(step, trainer_state, **options)
        self.asked = True


def test_a_request_during_a_save_needs_no_other_step() -> None:
    model, checkpoints = RecordingImitator(), InterruptedCheckpoints()
    trainer = SftTrainer(
        sft_config(5), model, CountedExamples(), checkpoints, MemoryLogger(), lambda: checkpoints.asked
    )
    with pytest.raises(RunInterrupted, match="saved after step 2"):
        trainer.train()
    assert list(checkpoints.saved) == [2] and len(model.batches) == 2
    assert checkpoints.awaited == {2}
