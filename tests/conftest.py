"""Options of the whole suite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

# The same examples in every run; `pytest --hypothesis-profile default` looks for others.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

# Triton's kernels run as Python on CPU tensors; read when Triton is first imported, here and in processes of tests.
os.environ.setdefault("TRITON_INTERPRET", "1")

SYSTEM_PACKAGES = (
    "no Slurm",
    "no bubblewrap",
    "vLLM is not installed",
    "NeMo-Run is not installed",
    "wandb is not installed",
)
"""How the reasons of tests begin that are skipped for want of something that can be installed."""

LONG = (
    "test_benches",
    "test_slurm",
    "test_vllm_training",
    "test_vllm_engine",
    "test_vllm_sets",
    "test_vllm_servers",
    "test_nemo_run",
    "test_curve_parity",
    "test_parity_matrix",
    "test_vllm_ipc",
    "test_vllm_ranks",
    "test_resume",
    "test_own_model_page",
    "test_tutorial",
    "test_checkpoints",
)
"""Files of a minute or more, longest first: they begin first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-packages", action="store_true", help="fail where a package that tests need is missing")
    parser.addoption(
        "--full-matrix", action="store_true", help="every layout up to eight ranks (make test-distributed)"
    )


def _fail_if_missing(report: Any, config: pytest.Config) -> None:
    if config.getoption("--all-packages") and report.skipped:
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason.startswith(SYSTEM_PACKAGES):
            report.outcome = "failed"
            report.longrepr = f"skipped, although --all-packages was given: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    _fail_if_missing(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _fail_if_missing(report, collector.config)
    return report


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that half knows the small task, trained once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "start"
    with FileLock(root / "start.lock"):
        if not (folder / "sft" / "summary.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            here = Path(__file__).parent / "distributed"
            code = f"from small_task import make_start; make_start({str(folder)!r})"
            subprocess.run([sys.executable, "-c", code], cwd=here, check=True, capture_output=True, timeout=300)
    return str(folder / "sft" / "hf")
