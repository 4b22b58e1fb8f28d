"""The logger for Weights & Biases, with the real package and without its server."""

from __future__ import annotations

import json
import os
import struct
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_prime.observe.loggers import LoggerRequest, make_logger

pytestmark = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def rows_in(file: Path) -> list[dict[str, Any]]:
    """The logged rows of an offline run, read back from the file that would be sent: a LevelDB log of one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, rows = file.read_bytes(), []
    assert len(content) < 2**15
    place = 7  # Behind the head of the file.
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1, "a record in one piece"
        record = Record.FromString(content[place + 7 : place + 7 + length])
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
        place += 7 + length
    return rows


def test_a_resumed_run_goes_on_as_the_same_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume_step, steps in ((None, (0, 1, 2)), (1, (2, 3))):
        request = LoggerRequest(
            folder=tmp_path, run_name="mine", num_steps=3, config={"prm": {"beta": 0.05}}, resume_step=resume_step
        )
        logger = make_logger("wandb", request)
        for step in steps:
            logger.log(step, {"policy/loss": step / 2})
        logger.close()
        time.sleep(1.1)  # wandb names the folders of one run by the second
    run_id = (tmp_path / "run_id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"), key=os.path.getmtime)
    assert [row["step"] for file in files for row in rows_in(file)] == [0, 1, 2, 2, 3]
    assert rows_in(files[-1])[-1] == {"step": 3, "policy/loss": 1.5}
