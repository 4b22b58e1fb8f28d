"""The example of NeMo-Run in its environment, with sizes of seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.prefix) / "nemo-run" / "bin" / "python"
REASON = "NeMo-Run is not installed: make setup-nemo-run"


def nemo_run(
    folder: Path, *arguments: str, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Runs NeMo-Run's interpreter; experiments go below `folder`. A wide terminal keeps long lines whole."""
    changed = {**environment, "NEMORUN_HOME": str(folder / "nemo"), "COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(PYTHON), *arguments], env=changed, capture_output=True, text=True, timeout=300, cwd=ROOT)


def experiment(folder: Path, way: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """SFT, PRIME and evaluation, each a few steps."""
    overrides = [
        f"sft.run.directory={folder}",
        "sft.run.num_steps=10",
        "sft.run.plots=false",
        "sft.sft.log_every_steps=5",
        "sft.sft.optimizer.lr_warmup_steps=0",
        f"prime.run.directory={folder}",
        f"prime.model.path={folder}/demo/sft/hf",
        "prime.run.num_steps=1",
        "prime.run.plots=false",
        "prime.rollout.num_prompts=4",
        "prime.rollout.max_response_tokens=16",
        "prime.filter.enabled=false",
        "prime.evaluation.num_prompts=0",
        f"evaluate.model.path={folder}/demo/hf",
        "evaluate.evaluation.num_prompts=4",
    ]
    script = str(ROOT / "examples" / "nemo_run" / "sft_prime_evaluate.py")
    return nemo_run(folder, script, way, *overrides, environment=environment)


def check_results(folder: Path) -> None:
    """What the three tasks leave: two runs, and an evaluation of the second one's model in a log."""
    summaries = [json.loads((folder / run / "summary.json").read_text()) for run in ("demo/sft", "demo")]
    assert [summary["num_steps"] for summary in summaries] == [10, 1]
    logs = [path.read_text(errors="replace") for path in (folder / "nemo").rglob("*") if is_log(path)]
    (evaluated,) = {
        line.strip().rpartition("]: ")[2] for log in logs for line in log.splitlines() if '"model":' in line
    }
    assert f"{folder}/demo/hf" in evaluated


def is_log(path: Path) -> bool:
    return path.is_file() and path.suffix in (".log", ".out")
