"""Megatron finds what it needs, and torch is itself again afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.mcore.cpu import megatron_platform, on_megatron_platform
from megatron_prime.mcore.packing import TokenRows
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import ModelRole, RoleSetup
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is patched")

OWNERS = (torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Module)


def real_torch() -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in OWNERS]


def assert_real(before: list[dict[str, Any]]) -> None:
    for owner, attributes in zip(OWNERS, before, strict=True):
        now = vars(owner)
        changed = {name for name in attributes | now if attributes.get(name) is not now.get(name)}
        assert not changed, f"{owner}: {changed}"
    assert torch._C._len_torch_function_stack() == 0


def answers() -> dict[str, Any]:
    """What Megatron asks, each answered for the CPU."""
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    stream.wait_stream(torch.cuda.current_stream())
    event.record(stream)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
    torch.cuda.set_device(0)
    return {
        "device": torch.cuda.current_device(),
        "made": torch.zeros(2, device="cuda").device,
        "made_by_index": torch.empty(2, device=torch.device("cuda", 0)).device,
        "moved": torch.zeros(2).to("cuda").device,
        "cast": torch.zeros(2).to("cuda", torch.float64).dtype,
        "type": torch.zeros(2, dtype=torch.bfloat16).type(),
        "random_state": torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state()),
        "event": (event.query(), event.elapsed_time(torch.cuda.Event())),
        "memory": torch.cuda.memory_allocated(),
        "compiled": torch.compile(answers) is answers,
    }


def test_megatrons_questions_are_answered_for_the_cpu() -> None:
    before = real_torch()
    with megatron_platform():
        found = answers()
        tensor, module = torch.zeros(2), torch.nn.Linear(1, 1)
        assert tensor.cuda() is tensor and module.cuda() is module
        assert tensor.type(torch.float64).dtype is torch.float64
    cpu = torch.device("cpu")
    assert found == {
        "device": cpu,
        "made": cpu,
        "made_by_index": cpu,
        "moved": cpu,
        "cast": torch.float64,
        "type": "torch.cuda.BFloat16Tensor",
        "random_state": True,
        "event": (True, 0.0),
        "memory": 0,
        "compiled": True,
    }
    assert_real(before)
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).cuda()


def test_random_state_goes_both_ways() -> None:
    with megatron_platform():
        torch.cuda.manual_seed(11)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


def test_blocks_nest() -> None:
    before = real_torch()
    with megatron_platform():
        with megatron_platform():
            assert answers()["device"] == torch.device("cpu")
        assert torch._C._len_torch_function_stack() == 1
        assert answers()["device"] == torch.device("cpu")
    assert_real(before)
    with megatron_platform():
        assert answers()["compiled"]
    assert_real(before)


def test_an_error_restores_torch_too() -> None:
    before = real_torch()

    @on_megatron_platform
    def fails() -> None:
        with megatron_platform():
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    assert_real(before)


def test_a_decorated_function_is_still_itself() -> None:
    @on_megatron_platform
    def device_name(prefix: str, *, suffix: str) -> str:
        """Names the device."""
        return f"{prefix}{torch.cuda.current_device()}{suffix}"

    assert device_name("<", suffix=">") == "<cpu>"
    assert (device_name.__name__, device_name.__doc__) == ("device_name", "Names the device.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=32,
    )
    torch.manual_seed(3)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def role(folder: Path) -> Iterator[ModelRole]:
    with parallel_layout(ParallelSection(), seed=1) as layout:
        setup = RoleSetup(
            architecture=read_architecture(folder),
            model=ModelSection(path=str(folder), make_vocab_size_divisible_by=8),
            parallel=ParallelSection(),
            micro_batch=MicroBatchSection(micro_batch_size=2),
            layout=layout,
        )
        role = ModelRole(setup)
        role.load_hf(HfFolder(folder))
        yield role


def test_transformers_runs_between_megatron_calls(folder: Path, role: ModelRole) -> None:
    rows = TokenRows(
        prompt_token_ids=((3, 4, 5), (6,)),
        response_ids=torch.tensor([[7, 8], [9, 0]]),
        mask=torch.tensor([[True, True], [True, False]]),
    )
    before = real_torch()
    first = role.logprobs(rows)
    assert_real(before)
    model = Qwen2ForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        picked = model(torch.tensor([[3, 4, 5, 7, 8]])).logits.log_softmax(-1)[0, (2, 3), (7, 8)]
    assert_real(before)
    assert torch.equal(role.logprobs(rows), first)
    assert_real(before)
    assert (first[0] - picked).abs().max() < 1e-5
    assert first[1, 0] < 0 and first[1, 1] == 0


FRESH = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40, "rms_norm_eps": 1e-6}
shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "rope_theta": 1e4}
(folder / "config.json").write_text(json.dumps(shape | {"model_type": "qwen2"}))

from megatron_prime.config.schema import MicroBatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.role import RoleSetup, TrainableRole
from megatron_prime.weights.architecture import read_architecture

assert "torch._dynamo" not in sys.modules
with parallel_layout(ParallelSection(), seed=1) as layout:
    setup = RoleSetup(
        architecture=read_architecture(folder),
        model=ModelSection(path=str(folder), make_vocab_size_divisible_by=8),
        parallel=ParallelSection(),
        micro_batch=MicroBatchSection(micro_batch_size=2),
        layout=layout,
    )
    TrainableRole(setup, OptimizerSection(lr=1e-3), num_optimizer_steps=1)
"""


def test_a_fresh_process_builds_a_model_first_of_all(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
