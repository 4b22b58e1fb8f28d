"""Which GPU a process takes, and what CUDA must know before."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_prime.mcore import parallel


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "expected"),
    [("3", 8, 3), ("3", 1, 0), (None, 8, 0)],
    ids=["all visible", "only its own visible", "one process"],
)
def test_a_process_takes_a_gpu_that_it_can_see(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, num_gpus: int, expected: int
) -> None:
    taken: list[int] = []
    connections: list[str | None] = []

    def is_available() -> bool:
        connections.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return True

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    # Set first, so that it is put back after the test whatever the code does with it.
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert parallel._local_device() == torch.device("cuda", expected)
    assert taken == [expected]
    assert connections[0] == "1"


def test_a_number_of_connections_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert parallel._local_device() == torch.device("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
