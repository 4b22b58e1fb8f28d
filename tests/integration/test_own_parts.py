"""Parts of the user's own: the shipped examples train, broken ones are refused before anything starts."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import prime_config, small_model_folder, write_yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime import load_config, train
from megatron_prime.assembly.preflight import check
from megatron_prime.commands.main import main
from megatron_prime.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN_PROMPTS = (
    "data.kind=own",
    "data.factory=own_prompts:make",
    "data.options={largest: 5}",
    "data.max_prompt_tokens=64",
)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are noise, with the arithmetic tokenizer."""
    folder = small_model_folder(tmp_path_factory.mktemp("models") / "random")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps of a few short answers, and the examples where Python finds them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sections: dict[str, Any] = {
        "run": {"num_steps": 2},
        "rollout": {"num_prompts": 4, "num_responses": 4, "max_response_tokens": 6},
        "filter": {"min_accuracy": 0, "max_accuracy": 1, "max_attempts": 1},
        "evaluation": {"num_prompts": 4},
        "checkpoint": {"every_steps": 1, "export_hf": False},
    }
    return write_yaml(tmp_path / "run.yaml", prime_config(str(random_model), str(tmp_path), "run", **sections))


def rows_of(config: Path) -> list[dict[str, Any]]:
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_verifier_of_the_example_gives_the_rewards(config: Path) -> None:
    from own_verifier import LastNumber

    from megatron_prime import Case, check_verifier

    cases = [Case("2+2=5;no, 4", "4", 1.0), Case("4 or 5", "4", 0.0), Case("four", "4", 0.0)]
    check_verifier(lambda section: LastNumber(2), cases)
    train(load_config(config, ["verifier.factory=own_verifier:make"]))
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [0, 1, 2]
    # The built-in verifier would find no box in such noise.
    assert any(row.get("verdict/wrong", 0) > 0 for row in rows)
    assert all(row["verdict/missing"] == 0 for row in rows[1:])


def test_the_prompts_of_the_example_are_trained_on_and_evaluated(config: Path) -> None:
    summary = train(load_config(config, OWN_PROMPTS))
    assert (summary["num_steps"], summary["num_prompts_sampled"]) == (2, 8)
    assert [row["step"] for row in rows_of(config)] == [0, 1, 2]
    assert "evaluation/accuracy" in rows_of(config)[-1]


def test_the_logger_of_the_example_writes_all_steps_once_over_a_resume(config: Path) -> None:
    loggers = "run.loggers=[own_logger:make]"
    train(load_config(config, [loggers, "run.num_steps=2"]))
    folder = config.parent / "run" / "loggers" / "own_logger.make"
    with (folder / "metrics.csv").open("a", newline="") as file:
        # What a run that died after its checkpoint has left.
        csv.writer(file).writerow((3, "policy/loss", 99.0))
    train(load_config(config, [loggers, "run.num_steps=4"]))
    with (folder / "metrics.csv").open(newline="") as file:
        logged = {(int(step), name): float(value) for step, name, value in csv.reader(file)}
    expected = {
        (row["step"], name): value
        for row in rows_of(config)
        for name, value in row.items()
        if name != "step" and value is not None
    }
    assert logged == expected and {step for step, _ in logged} == {0, 1, 2, 3, 4}
    assert not (config.parent / "run" / "tensorboard").exists()


def test_all_three_by_the_documented_command(config: Path) -> None:
    parts = ["verifier.factory=own_verifier:make", *OWN_PROMPTS, "run.loggers=[tensorboard, own_logger:make]"]
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "megatron_prime", "train", str(config), *parts],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert list((config.parent / "run" / "tensorboard").glob("events.*"))


def test_a_logger_that_fails_does_not_end_the_run(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    (config.parent / "fails_later.py").write_text(
        "class Fails:\n"
        "    def __init__(self, request): self.is_trial = request.is_trial\n"
        "    def log(self, step, metrics):\n"
        "        if step == 1 and not self.is_trial: raise OSError('disk full')\n"
        "    def close(self): pass\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(config.parent))
        train(load_config(config, ["run.loggers=[fails_later:Fails]"]))
    assert [row["step"] for row in rows_of(config)] == [0, 1, 2]
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert message == "run.loggers: fails_later:Fails failed at step 1 and is left out: OSError: disk full"


BROKEN = {
    "verifier.factory": (
        "from megatron_prime import Verdict\n"
        "from own_verifier import LastNumber\n"
        "class Broken(LastNumber):\n"
        "    def _judge(self, prompt, response): return Verdict(status='sure', reward=2.0)\n"
        "def make(section): return Broken(1)\n",
        "broken_0:make: answer '': the verdict has reward 2.0; it must be a number from 0 to 1, or None; submit must",
    ),
    "data.factory": (
        "import random\n"
        "from own_prompts import Products\n"
        "class Broken(Products):\n"
        "    def __init__(self, request):\n"
        "        super().__init__(request)\n"
        "        random.shuffle(self._train)\n"
        "make = Broken\n",
        "broken_1:make: two sources made with equal requests give other prompts; take all randomness from the request",
    ),
    "run.loggers": (
        "from own_logger import CsvLogger\n"
        "class Broken(CsvLogger):\n"
        "    def log(self, step, metrics): self._writer.writerow((step, metrics['policy/loss']))\n"
        "make = Broken\n",
        "broken_2:make raised KeyError: 'policy/loss' (",
    ),
}


@pytest.mark.parametrize("key", BROKEN)
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_broken_variant_is_refused_with_the_reason(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str, command: str
) -> None:
    program, reason = BROKEN[key]
    module = f"broken_{list(BROKEN).index(key)}"
    (config.parent / f"{module}.py").write_text(program)
    monkeypatch.syspath_prepend(str(config.parent))
    monkeypatch.delitem(sys.modules, module, raising=False)
    name = f"{module}:make"
    overrides = [f"{key}=[{name}]" if key == "run.loggers" else f"{key}={name}"]
    if key == "data.factory":
        overrides = [*OWN_PROMPTS, *overrides]
    # Of two ranks none is started.
    assert main([command, str(config), "parallel.world_size=2", *overrides]) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert lines[0] == "ConfigError:"
    assert lines[1].startswith(f"{key}: {reason}"), lines
    assert not (config.parent / "run").exists()


def test_ranks_that_were_started_import_parts_and_leave_trying_them_to_who_started_them(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.parent / "refuses_trials.py").write_text("def make(request): raise OSError('tried')\n")
    monkeypatch.syspath_prepend(str(config.parent))
    refusing, absent = (load_config(config, [f"run.loggers=[{name}:make]"]) for name in ("refuses_trials", "absent"))
    with pytest.raises(ConfigError, match="OSError: tried"):
        check(refusing)
    # Shapes alone need neither the user's code nor the model's files.
    check(absent, check_files=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check(refusing)
    with pytest.raises(ConfigError, match="No module named 'absent'"):
        check(absent)
