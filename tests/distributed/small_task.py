"""A one-operation arithmetic task and a model that half knows it: a PRIME run of seconds that still learns."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_prime.assembly import run as build
from megatron_prime.config.loader import load_config

ARITHMETIC = Path(__file__).resolve().parents[2] / "configs" / "models" / "arithmetic"
DATA = {"kind": "arithmetic", "max_start": 9, "max_operations": 2, "step_error_rate": 0.3, "num_problems": 2000}


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def small_model_folder(folder: Path, **changes: Any) -> Path:
    """The shipped arithmetic model's tokenizer with a smaller shape, or another one."""
    shutil.copytree(ARITHMETIC, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "layer_types": None}
    config.pop("layer_types")
    config |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_start(root: str, num_steps: int = 250, **changes: Any) -> str:
    """Trains the starting model in this process; returns its Hugging Face folder."""
    folder = Path(root)
    folder.mkdir(exist_ok=True)
    config = {
        "kind": "sft",
        "run": {"name": "sft", "directory": str(folder), "num_steps": num_steps, "plots": False},
        "model": {"path": str(small_model_folder(folder / "shape", **changes)), "init": "random"},
        "data": DATA,
        "sft": {
            "batch_size": 32,
            "log_every_steps": 50,
            "optimizer": {"lr": 5e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 20},
        },
        "checkpoint": {"every_steps": 0},
    }
    build.run(load_config(write_yaml(folder / "sft.yaml", config)))
    return str(folder / "sft" / "hf")


def prime_config(start: str, directory: str, name: str, **sections: Any) -> dict[str, Any]:
    """A PRIME run on the small task; `sections` are merged over the defaults."""
    config: dict[str, Any] = {
        "run": {"name": name, "directory": directory, "num_steps": 3, "seed": 5, "plots": False},
        "model": {"path": start},
        "data": DATA,
        "rollout": {"num_prompts": 12, "num_responses": 4, "max_response_tokens": 32},
        "filter": {"max_attempts": 2},
        "prm": {"num_window_batches": 2, "optimizer": {"lr": 1e-4}},
        "advantage": {"process_gate": "none"},
        "policy": {"num_minibatches": 2, "optimizer": {"lr": 1e-4}},
        "evaluation": {"every_steps": 0, "num_prompts": 40},
        "checkpoint": {"every_steps": 0, "export_hf": True},
    }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    return config


def read_curve(directory: str, name: str) -> list[dict[str, float | None]]:
    """The metrics log without what depends on the clock and on the process."""
    lines = (Path(directory) / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


def run_prime(config: dict[str, Any]) -> None:
    """Runs a configuration in the started processes."""
    # A file of each process: another one could read it half written.
    path = Path(config["run"]["directory"]) / f"{config['run']['name']}.{os.getpid()}.yaml"
    write_yaml(path, config)
    build.run(load_config(path))
