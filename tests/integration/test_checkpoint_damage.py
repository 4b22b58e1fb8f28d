"""What can happen to a checkpoint, each kind to a real run's: found before training, with the right way on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_task import DATA, small_model_folder, write_yaml

from megatron_prime.assembly import run as build
from megatron_prime.checkpoint.manifest import MANIFEST, committed, step_of
from megatron_prime.config.loader import load_config
from megatron_prime.errors import CheckpointError, PrimeError
from megatron_prime.weights.conversion import to_hf

SHARD = "model/__0_0.distcp"


def config_of(directory: Path, shape: Path, **sections: Any) -> dict[str, Any]:
    return {
        "kind": "sft",
        "run": {"name": "run", "directory": str(directory), "num_steps": 4, "plots": False},
        "model": {"path": str(shape), "init": "random"},
        "data": DATA,
        "sft": {"batch_size": 4, "log_every_steps": 1, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"every_steps": 1, "keep_last": 5} | sections.get("checkpoint", {}),
    }


def train(config: dict[str, Any]) -> None:
    directory = Path(config["run"]["directory"])
    build.run(load_config(write_yaml(directory.parent / f"{directory.name}.yaml", config)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(shape, folder of a run of 4 steps that nothing happened to)."""
    root = tmp_path_factory.mktemp("whole")
    shape = small_model_folder(root / "shape")
    (root / "runs").mkdir()
    train(config_of(root / "runs", shape))
    return shape, root / "runs" / "run"


@pytest.fixture
def broken(whole: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """The same run, killed after its third step: the configuration to go on with."""
    shape, run = whole
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "run")
    for name in ("checkpoints/step_00000004", "hf"):
        shutil.rmtree(tmp_path / "runs" / "run" / name)
    return config_of(tmp_path / "runs", shape)


def checkpoints_of(config: dict[str, Any]) -> Path:
    return Path(config["run"]["directory"]) / config["run"]["name"] / "checkpoints"


def newest(config: dict[str, Any]) -> Path:
    return committed(checkpoints_of(config))[-1]


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    edit(path, lambda content: content.__setitem__(len(content) // 2, content[len(content) // 2] ^ 1))


def change_a_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def take_from_the_step_before(path: Path) -> None:
    shutil.copyfile(path.parent.parent / "step_00000002" / path.name, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated shard": (SHARD, cut_in_half, "bytes instead of"),
    "altered bit": (SHARD, flip_a_bit, "is altered"),
    "altered description": ("model/.metadata", flip_a_bit, "is altered"),
    "missing shard": (SHARD, Path.unlink, "is missing"),
    "missing manifest": (MANIFEST, Path.unlink, "is missing"),
    "half-written manifest": (MANIFEST, cut_in_half, "is half written or altered"),
    "altered manifest": (MANIFEST, change_a_digit, "is altered"),
    "empty folder": ("", empty, f"{MANIFEST} is missing"),
    "missing trainer state": ("trainer.pt", Path.unlink, "is missing"),
    "trainer state of another step": ("trainer.pt", take_from_the_step_before, "is altered"),
    "dangling link": (SHARD, link_to_nothing, "is a link to a file that is gone"),
    "a folder in place of a file": (SHARD, lambda path: (path.unlink(), path.mkdir()), "is missing"),
}


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(path / "model.safetensors") for path in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_previous_checkpoint_is_used(kind: str, whole, broken, caplog: pytest.LogCaptureFixture) -> None:
    name, damage, message = DAMAGE[kind]
    path = newest(broken)
    damage(path / name)
    with caplog.at_level(logging.WARNING):
        train(broken)
    (warning,) = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert warning.startswith(f"{path} is damaged ({name or MANIFEST}") and message in warning
    assert "continuing from" in warning and "step_00000002, kept as step_00000003.damaged" in warning
    names = sorted(path.name for path in checkpoints_of(broken).iterdir())
    assert names == [*(f"step_0000000{n}" for n in (1, 2, 3)), "step_00000003.damaged", "step_00000004"]
    run = Path(broken["run"]["directory"]) / "run"
    assert same_weights(run / "hf", whole[1] / "hf")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(PrimeError) as caught:
        train(config)
    return str(caught.value)


def test_without_a_whole_checkpoint_nothing_is_touched(broken) -> None:
    for path in committed(checkpoints_of(broken)):
        cut_in_half(path / SHARD)
    (checkpoints_of(broken) / "step_00000009.writing").mkdir()
    before = sorted(checkpoints_of(broken).rglob("*"))
    message = refused(broken)
    assert message.count("bytes instead of") == 3 and "no checkpoint is whole" in message
    assert sorted(checkpoints_of(broken).rglob("*")) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("roles", ["policy", "prm"], "has roles ['policy', 'prm'], this run ['model']"),
        ("model vocab_size", 7, "has model vocab_size 7, this run"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(broken, key: str, value: Any, message: str) -> None:
    from megatron_prime.checkpoint.manifest import WRITING, commit, read_manifest

    path = newest(broken)
    manifest = read_manifest(path)
    object.__setattr__(manifest, "identity", {**manifest.identity, key: value})
    commit(path.rename(path.with_name(path.name + WRITING)), manifest)
    assert message in refused(broken)
    assert newest(broken) == path


def test_half_written_folders_go_and_foreign_files_stay(whole, broken, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoints_of(broken)
    shutil.copytree(newest(broken), folder / "step_00000004.writing")
    shutil.copytree(newest(broken), folder / "step_00000001.removing")
    (newest(broken) / "notes.txt").write_text("mine")
    with caplog.at_level(logging.INFO):
        train(broken)
    text = caplog.text
    assert f"removed {folder / 'step_00000004.writing'}, which was never finished" in text
    assert "not part of the checkpoint, ignored: notes.txt" in text
    assert (folder / "step_00000003" / "notes.txt").exists()
    assert same_weights(Path(broken["run"]["directory"]) / "run" / "hf", whole[1] / "hf")
    assert all(step_of(path) for path in folder.iterdir())


@pytest.fixture
def small_disk(whole: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint, not for two."""
    mount = tmp_path / "small"
    mount.mkdir()
    size = sum(file.stat().st_size for file in (whole[1] / "checkpoints" / "step_00000004").rglob("*"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size * 8 // 5}", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_keeps_what_was_good(
    whole, small_disk: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(small_disk / "runs", whole[0], checkpoint={"asynchronous": asynchronous, "export_hf": False})
    (small_disk / "runs").mkdir()
    assert "GB free; 4 more checkpoints of" in refused(config)
    # The disk has filled since the run began.
    config["checkpoint"]["keep_last"] = 1
    monkeypatch.setattr(build, "check_disk", lambda *_: None)
    message = refused(config)
    assert "step_00000002: cannot be written" in message and "No space left on device" in message
    assert "(kept: step_00000001)" in message
    assert [path.name for path in checkpoints_of(config).iterdir()] == ["step_00000001"]


def test_a_folder_that_cannot_be_written_is_found_first(whole, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").write_text("a file in the folder's place")
    message = refused(config_of(tmp_path / "runs", whole[0]))
    assert message.startswith(f"run.directory: {tmp_path}/runs/run/checkpoints cannot be written: Not a directory")
    # The kernel lets nobody make folders here, not even root.
    config = config_of(tmp_path / "runs", whole[0])
    config["run"]["directory"] = "/proc/sys"
    path = write_yaml(tmp_path / "read_only.yaml", config)
    with pytest.raises(CheckpointError, match=r"^run\.directory: /proc/sys/run/checkpoints cannot be written"):
        build.run(load_config(path))


def test_a_run_exports_as_it_goes_and_its_checkpoints_convert(whole, tmp_path: Path) -> None:
    shape, _ = whole
    (tmp_path / "runs").mkdir()
    config = config_of(tmp_path / "runs", shape, checkpoint={"export_every_saves": 2, "keep_last": 1})
    train(config)
    run = tmp_path / "runs" / "run"
    assert [path.name for path in committed(run / "checkpoints")] == ["step_00000004"]
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["step_00000002", "step_00000004"]
    to_hf(run / "checkpoints" / "step_00000004" / "model", tmp_path / "converted")
    for exported in (run / "exports" / "step_00000004" / "model", tmp_path / "converted"):
        assert same_weights(exported, run / "hf")
        assert (exported / "tokenizer.json").exists()


def test_an_altered_checkpoint_is_not_converted(whole: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    shutil.copytree(whole[1] / "checkpoints" / "step_00000004", checkpoint)
    with (checkpoint / SHARD).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=f"damaged: {SHARD} is altered; take another checkpoint"):
        to_hf(checkpoint / "model", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
