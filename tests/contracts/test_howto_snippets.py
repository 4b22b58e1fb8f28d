"""The Python of the how-to pages runs, and `check` accepts the parts that it defines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_prime.assembly.contracts.algorithm import check_own_algorithm
from megatron_prime.config.loader import load_config

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    ("own-estimator", "advantage.estimator", "mean_baseline"),
    ("own-loss", "policy.loss", "soft_clip"),
    ("own-loss", "prm.loss", "squared"),
    ("own-process-rewards", "advantage.process_source", "no_repeats"),
]


@pytest.mark.parametrize(("page", "key", "function"), PARTS)
def test_check_accepts_the_part_of_the_page(
    page: str, key: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / f"{page}.md").read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if f"def {function}(" in block)
    module = f"snippet_{function}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(ROOT / "configs" / "arithmetic.yaml", [f"{key}={module}:{function}"])
    assert check_own_algorithm(config) == []
