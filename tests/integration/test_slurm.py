"""tools/launch_prime.sbatch on a real Slurm of three virtual nodes: trains, saves, is requeued, goes on, ends clean."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from slurm_cluster import SlurmCluster, missing_programs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
from small_task import prime_config, read_curve, write_yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "launch_prime.sbatch"
COMMAND = [sys.executable, "-m", "megatron_prime.cli"]
SHORT_SECONDS, LONG_SECONDS = 60, 300

pytestmark = [
    pytest.mark.skipif(bool(missing_programs()), reason=f"no Slurm here: {', '.join(missing_programs())} missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="virtual nodes need root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    # Munge wants a path that everybody may enter, which pytest's own folders are not.
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)
    started = SlurmCluster(root, num_nodes=3)
    yield started
    started.stop()
    shutil.rmtree(root)


@pytest.fixture
def work(cluster: SlurmCluster, tmp_path: Path) -> Path:
    """A folder that jobs are submitted from, with every node up."""
    for node in cluster.nodes:
        cluster.ensure_running(node)
    return tmp_path


def submit(cluster: SlurmCluster, work: Path, options: str, *command: str) -> str:
    job = cluster.run(
        f"sbatch --parsable -t 10 {options} {SCRIPT} --python {sys.executable} -- {' '.join(command)}", cwd=work
    ).strip()
    assert job.isdigit(), job
    return job


def job_log(work: Path) -> str:
    return "".join(path.read_text() for path in work.glob("*.log"))


def wait_for(condition: Callable[[], bool], what: str, work: Path) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n{job_log(work)}"
        time.sleep(0.1)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def sft_config(directory: Path, name: str, **run: Any) -> Path:
    return write_yaml(
        directory / f"{name}.yaml",
        {
            "kind": "sft",
            "run": {"name": name, "directory": str(directory), **run},
            "model": {"path": str(ROOT / "configs" / "models" / "arithmetic"), "init": "random"},
            "parallel": {"world_size": 2} if name == "endless" else {},
            "data": {"kind": "arithmetic"},
            "sft": {"batch_size": 4, "log_every_steps": 1, "optimizer": {"lr": 1e-3}},
            "checkpoint": {"every_steps": 10, "export_hf": False},
        },
    )


def test_a_bad_node_is_named_and_excluded(cluster: SlurmCluster, work: Path) -> None:
    cluster.inside("n1", "fallocate -l 900M /dev/shm/full")
    try:
        shape = ROOT / "configs" / "models" / "arithmetic"
        plan = ("check", "--shapes-only", str(ROOT / "configs" / "arithmetic.yaml"), f"model.path={shape}")
        job = submit(cluster, work, "-N2 --ntasks-per-node=1", *plan)
        ended = cluster.wait(job, LONG_SECONDS)
    finally:
        cluster.inside("n1", "rm /dev/shm/full")
    log = job_log(work)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", "n1"), log
    assert "bad n1: /dev/shm has" in log and "bad nodes, excluded from now on: n1" in log
    logs = work / "logs" / f"prime-{job}"
    assert (logs / "attempt_0" / "nodes.log").exists()
    assert {path.name for path in (logs / "latest").glob("rank_*")} == {"rank_0_n2.log", "rank_1_n3.log"}
    assert "2 processes = 2 tensor" in (logs / "latest" / "rank_1_n3.log").read_text()
    assert "\nn3:1| layout" in log


def test_two_nodes_train_as_one_machine_through_stop_and_requeue(cluster: SlurmCluster, work: Path) -> None:
    start = start_model(work)
    layout = {"world_size": 4, "tensor_model_parallel_size": 2}
    paths = {}
    for name in ("local", "slurm"):
        run = {"name": name, "directory": str(work), "num_steps": 4, "seed": 5}
        config = prime_config(start, str(work), name, run=run, parallel=layout, checkpoint={"every_steps": 0})
        paths[name] = write_yaml(work / f"{name}.yaml", config)
    subprocess.run([*COMMAND, "train", str(paths["local"])], check=True, capture_output=True, timeout=LONG_SECONDS)

    job = submit(cluster, work, "-N2 --ntasks-per-node=2", "train", str(paths["slurm"]))
    wait_for(lambda: len(rows_of(work / "slurm")) >= 2, "no second row of metrics", work)
    # What Slurm itself does at --signal=B:USR1@300, without waiting for whole minutes.
    cluster.run(f"scancel --batch --signal=USR1 {job}")
    ended = cluster.wait(job, LONG_SECONDS)
    log = job_log(work)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped as asked and saved after step" in log and "resumed after step" in log
    assert read_curve(str(work), "slurm") == read_curve(str(work), "local")
    weights = [load_file(work / name / "hf" / "model.safetensors") for name in paths]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def start_model(work: Path) -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'distributed')!r}); "
    code += f"from small_task import make_start; make_start({str(work)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=LONG_SECONDS)
    return str(work / "sft" / "hf")


def test_a_lost_node_costs_no_checkpoint_and_cancelling_leaves_nothing(cluster: SlurmCluster, work: Path) -> None:
    config, folder = sft_config(work, "endless", num_steps=10**6), work / "endless"
    job = submit(cluster, work, "-N2 --ntasks-per-node=1", "sft", str(config))
    wait_for(lambda: (folder / "checkpoints" / "step_00000010").exists(), "no checkpoint", work)
    (lost,) = set(cluster.expand(cluster.state(job)["NodeList"])) - {cluster.state(job)["BatchHost"]}
    cluster.crash(lost)
    wait_for(lambda: cluster.state(job)["Restarts"] == "1", "the job was not requeued", work)
    saved = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir() if path.suffix == "")
    wait_for(lambda: cluster.state(job)["JobState"] == "RUNNING", "the job does not run again", work)
    num_rows = len(rows_of(folder))
    wait_for(lambda: rows_of(folder)[-1]["step"] > max(saved, num_rows) + 2, "the run does not go on", work)
    assert lost not in cluster.expand(cluster.state(job)["NodeList"])

    cluster.run(f"scancel {job}")
    assert cluster.wait(job, SHORT_SECONDS)["JobState"] == "CANCELLED"
    steps = [row["step"] for row in rows_of(folder)]
    assert steps == list(range(1, len(steps) + 1))  # went on where the checkpoint was, without a gap
    nodes = [node for node in cluster.nodes if node != lost]
    wait_for(lambda: not any("megatron_prime" in cluster.inside(n, "ps -eo args") for n in nodes), "ranks left", work)


def test_an_array_of_seeds(cluster: SlurmCluster, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    launch = [*COMMAND, "launch", "slurm", str(sft_config(work, "seeds", num_steps=3)), "--seeds=1,2,3"]
    launch += [f"--python={sys.executable}", "--time=10"]
    dry = subprocess.run([*launch, "--dry-run"], check=True, capture_output=True, text=True, cwd=work).stdout
    assert "--array=1,2,3" in dry and "run.seed=%a run.name=seeds_seed%a" in dry
    started = subprocess.run(launch, check=True, capture_output=True, text=True, cwd=work, timeout=SHORT_SECONDS).stdout
    job = started.split()[1].rstrip(";")
    folders = [work / f"seeds_seed{seed}" for seed in (1, 2, 3)]
    wait_for(lambda: all((folder / "summary.json").exists() for folder in folders), "a seed has no summary", work)
    assert len({json.loads((folder / "summary.json").read_text())["final_loss"] for folder in folders}) == 3
    status = subprocess.run([*COMMAND, "launch", "status", job], check=True, capture_output=True, text=True).stdout
    assert status.count("job ") >= 3 and "restarted 0 times" in status
