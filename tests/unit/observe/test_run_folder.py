"""The run folder: what is made, what a fresh start removes, what a resumed run forgets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prime.config import load_config
from megatron_prime.errors import ConfigError
from megatron_prime.observe.run_folder import RunFolder, commit, versions

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config():
    return load_config(ROOT / "configs" / "arithmetic.yaml")


def test_prepare_makes_folders_and_writes_a_config_that_loads_back(tmp_path, config):
    folder = RunFolder(tmp_path / "runs", "a/b")
    folder.prepare(config, "never")
    assert folder.path == tmp_path / "runs" / "a" / "b"
    assert all(path.is_dir() for path in (folder.checkpoints, folder.plots))
    assert load_config(folder.config_path) == config
    folder.prepare(config, "never")


def test_never_refuses_a_folder_with_a_checkpoint_and_auto_keeps_it(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    folder.metrics_path.write_text('{"step": 1}\n')
    (folder.checkpoints / "step_00000010").mkdir()
    folder.prepare(config, "auto")
    assert folder.metrics_path.exists()
    with pytest.raises(ConfigError, match=r"^run\.resume: never, but .*checkpoints"):
        folder.prepare(config, "never")


def test_a_run_goes_on_only_with_its_own_configuration(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    (folder.checkpoints / "step_00000010").mkdir()
    longer = load_config(ROOT / "configs" / "arithmetic.yaml", ["run.num_steps=99", "evaluation.every_steps=3"])
    folder.prepare(longer, "auto")
    other = load_config(ROOT / "configs" / "arithmetic.yaml", ["run.seed=7", "policy.optimizer.lr=0.5"])
    with pytest.raises(ConfigError) as caught:
        folder.prepare(other, "auto")
    first, second = caught.value.problems
    assert first.startswith("policy.optimizer.lr: 0.5, but the run in ")
    assert second.startswith("run.seed: 7, but the run in ")
    assert "began with 1" in second
    assert load_config(folder.config_path) == longer


def test_a_requeued_run_goes_on_with_servers_on_other_nodes(tmp_path):
    def on(node, *more):
        overrides = ["rollout.engine=vllm", f"rollout.vllm.servers=[http://{node}:8000]", *more]
        return load_config(ROOT / "configs" / "arithmetic.yaml", overrides)

    folder = RunFolder(tmp_path, "a")
    folder.prepare(on("node7"), "auto")
    (folder.checkpoints / "step_00000010").mkdir()
    folder.prepare(on("node9", "rollout.vllm.timeout_seconds=60"), "auto")
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.abort_after_seconds: 5"):
        folder.prepare(on("node9", "rollout.vllm.abort_after_seconds=5"), "auto")


def test_a_folder_is_one_process_s_while_it_lives(tmp_path, config):
    code = (
        "import sys; from megatron_prime.config import load_config\n"
        "from megatron_prime.observe.run_folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1], 'a'); folder.prepare(load_config(sys.argv[2]), 'auto')\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "configs" / "arithmetic.yaml")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match=rf"^run\.name: process {other.pid} on \S+ trains in .*; choose another"):
            RunFolder(tmp_path, "a").prepare(config, "auto")
        RunFolder(tmp_path, "b").prepare(config, "auto")
        other.kill()
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    folder.prepare(config, "auto")


def test_a_checkpoint_that_was_never_finished_is_none(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    folder.metrics_path.write_text('{"step": 0}\n')
    (folder.checkpoints / "step_00000010.writing").mkdir()
    folder.prepare(config, "never")
    assert not folder.metrics_path.exists()


def test_starting_over_forgets_what_the_earlier_try_measured(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    own = folder.logger_folder("my.module:make")
    assert own.parent == folder.loggers and ":" not in own.name
    stale = [folder.metrics_path, folder.logger_folder("tensorboard") / "events.out.1", own / "metrics.csv"]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    folder.prepare(config, "auto")
    assert not any(path.exists() for path in stale)


def test_a_finished_run_without_its_checkpoints_stays_as_it_is(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    folder.metrics_path.write_text('{"step": 1}\n')
    folder.summary_path.write_text("{}")
    for resume in ("auto", "never"):
        with pytest.raises(ConfigError, match=r"finished run .* checkpoints are gone; choose another run\.name"):
            folder.prepare(config, resume)
    assert folder.metrics_path.read_text() == '{"step": 1}\n'


def test_truncate_keeps_steps_up_to_the_checkpoint_and_drops_half_rows(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.truncate_metrics(3)
    folder.prepare(config, "auto")
    rows = [json.dumps({"step": step, "rollout/accuracy": step / 10}) + "\n" for step in range(6)]
    folder.metrics_path.write_text("".join(rows) + '{"step": 2, "rollout/acc')
    folder.truncate_metrics(3)
    assert folder.metrics_path.read_text() == "".join(rows[:4])
    folder.truncate_metrics(-1)
    assert folder.metrics_path.read_text() == ""
    files = [path.name for path in folder.path.iterdir() if path.is_file()]
    assert sorted(files) == [".lock", "config.yaml", "metrics.jsonl"]


def test_versions_name_the_interpreter_the_packages_and_the_commit(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    folder.write_versions()
    written = json.loads(folder.versions_path.read_text())
    assert written == versions()
    assert written["python"] == ".".join(map(str, sys.version_info[:3]))
    assert written["torch"].startswith("2.")
    assert written["megatron-core"] == "0.16.1"


def test_commit_is_the_one_git_names():
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    expected = result.stdout.strip() if result.returncode == 0 else None
    assert (commit() or "").removesuffix("-dirty") == (expected or "")


def test_a_resumed_run_finds_how_its_head_was_computed(tmp_path, config):
    folder = RunFolder(tmp_path, "a")
    folder.prepare(config, "auto")
    folder.write_head({"gemm": "onednn"})
    assert folder.recorded_head() is None  # without a checkpoint the run starts over
    (folder.checkpoints / "step_00000001").mkdir()
    assert folder.recorded_head() == {"gemm": "onednn"}
