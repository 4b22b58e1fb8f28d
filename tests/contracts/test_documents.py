"""Commands, links and snippets in README, docs and examples exist and are understood."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_prime.commands.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(program: str) -> list[str]:
    lines = [line for path in DOCUMENTS for line in path.read_text().splitlines()]
    found = [line.split(" #")[0].strip().removeprefix("$ ") for line in lines]
    return sorted({line for line in found if line.startswith(program + " ")})


@pytest.mark.parametrize("command", commands("megatron-prime"))
def test_commands_parse(command: str) -> None:
    options = build_parser().parse_args(shlex.split(command)[1:])
    config = getattr(options, "config", None)
    if config is not None and config.startswith("configs/"):
        assert (ROOT / config).exists()


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command: str) -> None:
    targets = [word for word in shlex.split(command)[1:] if "=" not in word]
    result = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_index_of_decisions_has_all_of_them() -> None:
    folder = ROOT / "docs" / "adr"
    listed = re.findall(r"\]\(([^)]+)\)", (folder / "index.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))


def test_commands_were_found() -> None:
    assert len(commands("megatron-prime")) >= 5
    assert "make demo" in commands("make")


@pytest.mark.parametrize(
    "example", [ROOT / "examples" / "process_rewards_in_your_own_loop.py"], ids=lambda path: path.name
)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert "advantages" in capsys.readouterr().out
