"""A wheel in a fresh environment and an empty folder: the package brings along what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=kept | environment, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`megatron-prime` of an environment that has this wheel; its dependencies are those of this interpreter."""
    root = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools leaves its build folder behind.
    source = root / "source"
    run(["git", "clone", "--quiet", ROOT, source], root)
    for name in ("setup.py", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(["cp", "-r", ROOT / "megatron_prime", source], root)
    built = run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", root, source], root)
    (wheel,) = root.glob("*.whl")
    assert built.returncode == 0, built.stderr
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / "bin" / "python"
    target = next((root / "venv" / "lib").glob("python*")) / "site-packages"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    found = run(command, root)
    assert found.returncode == 0, found.stderr
    # Behind the wheel on the path, and without the editable installation that is there.
    (target / "dependencies.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    return python.with_name("megatron-prime")


def test_the_package_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "import megatron_prime; print(megatron_prime.__file__)"
    where = run([installed.with_name("python"), "-c", code], tmp_path).stdout
    assert "site-packages" in where and str(ROOT) not in where
    assets = Path(where.strip()).parent / "assets"
    shapes = ["--shapes-only", str(assets / "arithmetic_sft.yaml"), f"model.path={assets / 'models' / 'arithmetic'}"]
    checked = run([installed, "check", *shapes], tmp_path)
    assert checked.returncode == 0 and "processes" in checked.stdout, checked.stderr
    dry = ["launch", "slurm", str(assets / "arithmetic_sft.yaml"), "--dry-run", "--tasks-per-node", "2"]
    launched = run([installed, *dry], tmp_path)
    assert launched.returncode == 0 and "assets/launch_prime.sbatch" in launched.stdout, launched.stderr


def test_its_demo_begins_and_learns(installed: Path, tmp_path: Path) -> None:
    """The demo takes minutes: it is interrupted as by Ctrl-C once its first steps are logged, and has saved."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [installed, "demo"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "demo" / "sft" / "metrics.jsonl"
    try:
        for _ in range(600):
            if metrics.is_file() and len(metrics.read_text().splitlines()) >= 2:
                break
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            process_wait(process, 0.2)
        process.terminate()
        assert process.wait(timeout=60) == 75, process.stderr.read() if process.stderr else ""
    finally:
        process.kill()
    losses = [float(line.partition('"sft/loss": ')[2].split(",")[0].rstrip("}")) for line in metrics.open()]
    assert losses[-1] < losses[0]
    assert list((tmp_path / "runs" / "demo" / "sft" / "checkpoints").iterdir())


def process_wait(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return
