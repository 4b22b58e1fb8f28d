"""Every command of docs/howto/own-model-and-data.md, typed word for word, in order, with the files that it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_configs import GSM8K, make_start
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "own-model-and-data.md").read_text()
COMMANDS = re.findall(r"^megatron-prime .*$", PAGE, flags=re.MULTILINE)
SMALL = """
base: page.yaml
run: {num_steps: 2}
rollout: {num_prompts: 2, max_response_tokens: 6}
filter: {enabled: false}
policy: {num_minibatches: 1}
evaluation: {num_prompts: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's my.yaml with smaller sizes, and small files under the names in it and in the commands."""
    root = tmp_path_factory.mktemp("page")
    make_start("qwen2.5-0.5b", root / "models" / "Qwen2.5-0.5B")
    shutil.copytree(GSM8K, root / "gsm8k")
    (root / "configs").symlink_to(ROOT / "configs")
    (configuration,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (root / "page.yaml").write_text(configuration)
    (root / "my.yaml").write_text(SMALL)
    answers = [
        {"response": f"Twelve sevens are \\boxed{{{value}}}.", "ground_truth": "84", "ability": "math"}
        for value in (84, 74)
    ]
    (root / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return root


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[str, str]:
    """What each command printed, by its sub-command; all of them ended well."""
    result = {}
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for command in COMMANDS:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        result[" ".join(command.split()[1:3]).removesuffix(" my.yaml")] = done.stdout
    return result


def test_commands_do_what_they_say(folder: Path, outputs: dict[str, str]) -> None:
    assert outputs.keys() >= {"check", "train", "evaluate", "generate runs/my/hf", "convert to-megatron"}
    assert "2 prompts x" in outputs["check"]
    rows = [json.loads(line) for line in (folder / "runs" / "my" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert json.loads(outputs["evaluate"])["num_prompts"] == 2
    answer = json.loads(outputs["generate runs/my/hf"])
    assert answer["prompt"] == "What is 12 * 7?" and answer["finish_reason"] in ("stop", "length")
    assert "7" in outputs["check --shapes-only"]
    graded = [json.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]
    assert [(row["status"], row["reward"]) for row in graded] == [("correct", 1.0), ("wrong", 0.0)]
    with safe_open(folder / "runs" / "my" / "hf" / "model.safetensors", "pt") as weights:
        assert "model.embed_tokens.weight" in set(weights.keys())
    assert any((folder / "megatron" / "qwen").iterdir())


def test_the_configuration_of_the_page_is_whole(folder: Path) -> None:
    command = [sys.executable, "-m", "megatron_prime", "check", "page.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "200" in done.stdout
