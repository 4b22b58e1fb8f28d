"""The tutorial from beginning to end: its files and commands word for word, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial" / "from-files-to-a-better-model.md").read_text()
FILES = re.findall(r"Save this as `([^`]+)`:\n\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^(?:megatron-prime|python) .*$", PAGE, flags=re.MULTILINE)
FEWER_STEPS = {"megatron-prime sft sums/sft.yaml": 250, "megatron-prime train sums/prime.yaml": 3}
UNCHANGED = "sums/filtered"  # which ends after five steps by itself


def shortened(command: str) -> str:
    """The command with fewer steps; a later setting on the line still wins."""
    for beginning, num_steps in FEWER_STEPS.items():
        if command.startswith(beginning) and UNCHANGED not in command:
            return command.replace(beginning, f"{beginning} run.num_steps={num_steps}", 1)
    return command


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command printed; all of them ended well."""
    root = tmp_path_factory.mktemp("tutorial")
    (root / "configs").symlink_to(ROOT / "configs")
    for name, content in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    result = {"folder": str(root)}
    for command in COMMANDS:
        done = subprocess.run(
            ["bash", "-c", shortened(command)], cwd=root, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        result[command] = done.stdout + done.stderr
    return result


def rows(outputs: dict[str, str], name: str) -> list[dict[str, float]]:
    lines = (Path(outputs["folder"]) / "runs" / "sums" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_start_answers_some_questions_and_the_run_trains_on_them(outputs: dict[str, str]) -> None:
    before, *steps = rows(outputs, "prime")
    assert 0.1 < before["evaluation/accuracy"] < 0.8
    assert len(steps) == 3 and all(step["filter/kept"] > 0.3 for step in steps)
    assert (Path(outputs["folder"]) / "runs" / "sums" / "prime" / "plots" / "training.png").exists()
    (evaluated,) = (text for command, text in outputs.items() if command.startswith("megatron-prime evaluate"))
    assert '"num_prompts": 200' in evaluated


def test_the_runs_that_go_wrong_do_so_as_described(outputs: dict[str, str]) -> None:
    (filtered,) = (text for command, text in outputs.items() if "sums/filtered" in command)
    assert "without enough groups between filter.min_accuracy and filter.max_accuracy" in filtered
    cut = rows(outputs, "cut")[-1]
    assert cut["rollout/truncated"] > 0.5
    assert cut["verdict/no_answer"] + cut["verdict/malformed"] > 0.5
