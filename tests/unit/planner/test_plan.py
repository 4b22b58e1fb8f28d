"""The planner: what it adds up, what it compares with, and how fast it answers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prime.commands.main import main
from megatron_prime.config import PrimeConfig, load_config
from megatron_prime.errors import ConfigError
from megatron_prime.planner import footprint
from megatron_prime.planner.hardware import GIB, PROFILES
from megatron_prime.planner.plan import Plan, make_plan
from megatron_prime.planner.plan_text import plan_rows
from megatron_prime.planner.search import hardware_of, search_layouts
from megatron_prime.weights.architecture import ExpertLayers, ModelArchitecture, read_architecture
from megatron_prime.weights.hf_folder import expected_shapes

ROOT = Path(__file__).resolve().parents[3]
SHAPES = ROOT / "configs" / "models" / "shapes"
PUBLISHED_PARAMETERS = {
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
}
"""`num_parameters` of the models' safetensors, as their Hugging Face pages show them."""
H100 = PROFILES["h100"]


def recipe(name: str, shape: str, *overrides: str) -> tuple[PrimeConfig, ModelArchitecture]:
    config = load_config(ROOT / "configs" / f"{name}.yaml", [f"model.path={SHAPES / shape}", *overrides])
    assert isinstance(config, PrimeConfig)
    return config, read_architecture(SHAPES / shape)


def plan_of(name: str, shape: str, *overrides: str) -> Plan:
    return make_plan(*recipe(name, shape, *overrides), H100)


@pytest.mark.parametrize("shape", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(shape: str) -> None:
    assert footprint.num_parameters(read_architecture(SHAPES / shape)) == PUBLISHED_PARAMETERS[shape]


@pytest.mark.parametrize("shared", [None, 512])
def test_experts_are_counted(shared: int | None) -> None:
    experts = ExpertLayers(
        num_experts=128, router_topk=8, normalize_weights=True, ffn_hidden_size=768, shared_ffn_hidden_size=shared
    )
    dense = read_architecture(SHAPES / "qwen3-8b")
    family = "qwen2_moe" if shared else "qwen3_moe"
    architecture = replace(dense, family=family, experts=experts)
    total = sum(math.prod(size) for size in expected_shapes(architecture).values())
    assert footprint.num_parameters(architecture) == total
    chosen = replace(experts, num_experts=8)
    router = 120 * architecture.hidden_size * architecture.num_layers
    assert footprint.active_parameters(architecture) - router == footprint.num_parameters(
        replace(architecture, experts=chosen)
    )

    config, _ = recipe("prime_qwen2.5_72b", "qwen3-8b", "parallel.tensor_model_parallel_size=1")
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), pipeline=1, tensor=1)
    whole, shared_out = (footprint.stage_parameters(architecture, replace(layout, expert=n), 0) for n in (1, 8))
    matrices = 3 * architecture.hidden_size * 768 * 128 * architecture.num_layers
    assert whole - shared_out == matrices * 7 // 8


@pytest.mark.parametrize("shape", PUBLISHED_PARAMETERS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (4, 2)])
def test_stages_hold_the_whole_model(shape: str, tensor: int, pipeline: int) -> None:
    architecture = read_architecture(SHAPES / shape)
    config, _ = recipe("prime_qwen2.5_72b", shape)
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), tensor=tensor, pipeline=pipeline)
    held = tensor * sum(footprint.stage_parameters(architecture, layout, stage) for stage in range(pipeline))
    padding = 2 * (footprint.vocabulary_rows(architecture, layout) * tensor - architecture.vocab_size)
    norms = (tensor - 1) * architecture.hidden_size * (2 * architecture.num_layers + 1)
    if architecture.qk_layernorm:
        norms += (tensor - 1) * 2 * architecture.kv_channels * architecture.num_layers
    assert held == footprint.num_parameters(architecture) + padding * architecture.hidden_size + norms


def test_bytes_per_parameter_are_those_of_mixed_precision() -> None:
    architecture = read_architecture(SHAPES / "qwen2.5-32b")
    config, _ = recipe("prime_qwen2.5_32b", "qwen2.5-32b")
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), data=1, distributed_optimizer=False)
    trained = footprint.model_bytes(architecture, layout, 0, trained=True)
    # Two of weights, four of gradients, twelve of Adam with float32 masters.
    assert trained.total == 18 * footprint.stage_parameters(architecture, layout, 0)
    sharded = footprint.model_bytes(architecture, replace(layout, data=4, distributed_optimizer=True), 0, trained=True)
    assert sharded.total == 9 * footprint.stage_parameters(architecture, layout, 0)
    assert footprint.model_bytes(architecture, layout, 0, trained=False).total * 9 == trained.total


def test_fp8_copies_of_the_layers_are_counted() -> None:
    config, architecture = recipe("prime_qwen2.5_72b", "qwen2.5-32b", "model.fp8=hybrid")
    layout = replace(footprint.LayoutSizes.of(config, on_cpu=False), tensor=2, pipeline=1, item_bytes=2)
    a = architecture
    tables = 2 * footprint.vocabulary_rows(a, layout) * a.hidden_size
    small = a.hidden_size * (2 * a.num_layers + 1) + a.num_layers * (a.num_attention_heads + 16) * a.kv_channels // 2
    matrices = footprint.stage_parameters(a, layout, 0) - tables - small
    assert footprint.fp8_copy_bytes(a, layout, training=False) == matrices
    assert footprint.fp8_copy_bytes(a, layout, training=True) == 2 * matrices
    assert footprint.fp8_copy_bytes(a, replace(layout, fp8=False), training=True) == 0

    def copies(offload: str) -> dict[str, list[str]]:
        config, _ = recipe("prime_qwen2.5_72b", "qwen2.5-32b", "model.fp8=hybrid", f"parallel.offload_idle={offload}")
        phases = make_plan(config, architecture, PROFILES["h100"]).phases
        return {phase.name: [part for part in phase.parts if part.endswith("FP8 copies")] for phase in phases}

    assert all(len(found) == 3 for found in copies("none").values())
    given_away = copies("all")
    assert given_away["rollout"] == []
    assert given_away["policy_update"] == ["policy FP8 copies"]


@pytest.mark.parametrize(
    ("overrides", "phase", "part"),
    [
        (("reference.source=policy",), "score", "reference weights"),
        (("advantage.process_coef=0",), "score", "PRM weights"),
        (("rollout.engine=vllm", "rollout.vllm.kv_cache_gib=2"), "rollout", "engine KV cache"),
        (("model.recompute_granularity=full",), "policy_update", "activations"),
        (("head.workspace_mib=1",), "policy_update", "logits"),
        (("micro_batch.micro_batch_tokens=4096",), "policy_update", "activations"),
        (("parallel.context_parallel_size=2",), "policy_update", "activations"),
        (("rollout.vllm.in_ranks=true",), "policy_update", "engine weights"),
        (("parallel.offload_idle=gradients",), "rollout", "policy gradients"),
        (("parallel.offload_idle=all",), "policy_update", "PRM optimizer"),
        (("rollout.vllm.servers=[http://node7:8000]",), "rollout", "engine KV cache"),
    ],
)
def test_settings_that_save_memory_save_it(overrides: tuple[str, ...], phase: str, part: str) -> None:
    def bytes_of(*more: str) -> float:
        plan = plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b", *more)
        return next(p for p in plan.phases if p.name == phase).parts.get(part, 0.0)

    assert bytes_of(*overrides) < 0.8 * bytes_of()


def test_the_peak_is_named() -> None:
    plan = plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b")
    assert plan.peak.name in ("prm_update", "policy_update") and plan.fits
    embedded = plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b", "rollout.engine=transformers")
    assert embedded.peak.name == "rollout" and not embedded.fits
    assert embedded.peak.parts["engine weights"] == 2 * PUBLISHED_PARAMETERS["qwen2.5-math-7b"]


def test_what_computes_is_there_and_the_rest_waits_in_host_memory() -> None:
    plain, idle = (
        plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b"),
        plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b", "parallel.offload_idle=all"),
    )
    parts = {phase.name: phase.parts for phase in idle.phases}
    models = {name: {part.split()[0] for part in of} & {"policy", "PRM", "reference"} for name, of in parts.items()}
    assert models == {"rollout": set(), "score": {"policy"}, "prm_update": {"PRM"}, "policy_update": {"policy"}}
    assert parts["policy_update"]["policy optimizer"] == plain.peak.parts["policy optimizer"]
    assert idle.host_bytes - plain.host_bytes > 8 * sum(
        plain.peak.parts[name] for name in ("policy optimizer", "PRM optimizer", "reference weights")
    )


def test_a_checkpoint_is_copied_where_training_goes_on_meanwhile() -> None:
    def host_bytes(*overrides: str) -> float:
        return plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b", *overrides).host_bytes

    on_its_way = 14 * 2 * PUBLISHED_PARAMETERS["qwen2.5-math-7b"]
    assert host_bytes() - host_bytes("checkpoint.asynchronous=false") == pytest.approx(on_its_way, rel=0.1)
    assert host_bytes("checkpoint.every_steps=0") == host_bytes("checkpoint.asynchronous=false")


def test_more_engines_sample_faster() -> None:
    def seconds(*overrides: str) -> float:
        return plan_of("prime_qwen2.5_72b", "qwen2.5-72b", *overrides).seconds["rollout"]

    beside, in_ranks = seconds(), seconds("rollout.vllm.in_ranks=true")
    one_server = seconds("rollout.vllm.servers=[http://node7:8000]")
    assert in_ranks < beside < one_server  # sixteen engines, four, one


def test_interleaved_stages_wait_less_and_keep_more() -> None:
    plain = plan_of("prime_qwen2.5_72b", "qwen2.5-72b")
    changed = plan_of("prime_qwen2.5_72b", "qwen2.5-72b", "parallel.virtual_pipeline_model_parallel_size=5")
    assert changed.seconds["update"] < plain.seconds["update"]
    assert changed.peak_gib > plain.peak_gib


def test_pipeline_and_recomputation_trade_memory_for_time() -> None:
    plain = plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b", "model.recompute_granularity=none")
    slow = plan_of("prime_qwen2.5_math_7b", "qwen2.5-math-7b", "model.recompute_granularity=full")
    assert slow.peak_gib < plain.peak_gib - 5
    assert slow.seconds["update"] > 1.2 * plain.seconds["update"]
    assert slow.seconds["rollout"] == plain.seconds["rollout"]


def test_estimates_stay_near_a_published_step() -> None:
    """NeMo-RL, Llama-3.1-8B, 8 H100, 2,048 answers of about 800 tokens, policy alone with a reference: 58 s generation,
    18 s log-probs, 28 s training. The machine's shares were set by this run, so it must come out within a third."""
    config, architecture = recipe(
        "prime_llama3.1_8b",
        "llama-3.1-8b",
        "advantage.process_coef=0",
        "policy.kl_coef=0.01",
        "policy.num_minibatches=4",
        "filter.enabled=false",
        "rollout.num_prompts=64",
        "rollout.num_responses=32",
        "rollout.vllm.tensor_parallel_size=1",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "model.recompute_granularity=none",
    )
    plan = make_plan(config, architecture, H100, mean_response_tokens=800)
    assert plan.seconds["rollout"] == pytest.approx(58, rel=0.34)
    assert plan.seconds["score"] == pytest.approx(18, rel=0.34)
    assert plan.seconds["update"] == pytest.approx(28, rel=0.34)


@pytest.mark.parametrize(
    ("text", "num_gpus", "per_node", "memory_gib"),
    [("8x80GB", 8, 8, 79.1), ("4x8x80gb", 32, 8, 79.1), ("16x80GB", 16, 8, 79.1), ("4x24GB", 4, 4, 24e9 / 2**30)],
)
def test_gpus_are_read(text: str, num_gpus: int, per_node: int, memory_gib: float) -> None:
    found, machine = hardware_of(text, H100)
    assert (found, machine.num_gpus_per_node) == (num_gpus, per_node)
    assert machine.memory_gib == pytest.approx(memory_gib)


@pytest.mark.parametrize("text", ["8", "8x80", "0x80GB", "x80GB", "8x80GBx2", "many"])
def test_gpus_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        hardware_of(text, H100)


def test_search_finds_what_fits_and_sorts_it() -> None:
    config, architecture = recipe("prime_qwen2.5_32b", "qwen2.5-32b")
    found = search_layouts(config, architecture, H100, 32)
    times = [candidate.plan.step_seconds for candidate in found]
    assert len(found) >= 3 and times == sorted(times)
    for candidate in found:
        assert candidate.plan.fits
        again = load_config(
            ROOT / "configs" / "prime_qwen2.5_32b.yaml",
            [f"model.path={SHAPES / 'qwen2.5-32b'}", *candidate.overrides()],
        )
        assert make_plan(again, architecture, H100).peak_gib == candidate.plan.peak_gib


def test_search_says_by_how_much_nothing_fits() -> None:
    config, architecture = recipe("prime_qwen2.5_72b", "qwen2.5-72b")
    with pytest.raises(ConfigError, match=r"no layout of 8 GPUs fits 79 GiB each; the smallest needs \d+ GiB"):
        search_layouts(config, architecture, H100, 8)


def test_check_prints_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "configs" / "prime_qwen2.5_32b.yaml"), f"model.path={SHAPES / 'qwen2.5-32b'}"]
    assert main(["check", "--shapes-only", "--gpus", "4x8x80GB", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("1. ") and "peak" in lines[0]
    assert "parallel.world_size=32" in lines[1]


def test_a_plan_that_does_not_fit_is_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "configs" / "prime_qwen2.5_32b.yaml"), f"model.path={SHAPES / 'qwen2.5-32b'}"]
    assert main(["check", "--shapes-only", *arguments, "parallel.pipeline_model_parallel_size=1"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_plan_speaks_of_its_own_machine() -> None:
    config, architecture = recipe("prime_qwen2.5_72b", "qwen2.5-72b")
    rows = dict(plan_rows(config, make_plan(config, architecture, H100)))
    assert {"GPU memory peak", "sent per GPU"} <= rows.keys()
    assert " 4 checkpoints of " in rows["disk"]
    assert re.fullmatch(r"about [\d.]+ hours, \d,\d\d0 process hours, evaluations not counted", rows["run time"])
    folder = ROOT / "configs" / "models" / "arithmetic"
    for num_steps, unit in ((1, "seconds"), (300, "minutes"), (300_000, "hours")):
        small = load_config(
            ROOT / "configs" / "arithmetic.yaml", [f"model.path={folder}", f"run.num_steps={num_steps}"]
        )
        rows = dict(plan_rows(small, make_plan(small, read_architecture(folder), PROFILES["cpu"])))
        assert "memory peak" in rows and "sent per process" in rows and not any("GPU" in subject for subject in rows)
        assert re.fullmatch(rf"about [\d.,]+ {unit}, [\d.,]+ process {unit}, evaluations not counted", rows["run time"])
        assert (" 1 checkpoint of " in rows["disk"]) == (num_steps == 1)


def test_a_plan_needs_neither_torch_nor_time() -> None:
    code = (
        "import sys; from megatron_prime.commands.main import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    arguments = [str(ROOT / "configs" / "prime_qwen2.5_72b.yaml"), f"model.path={SHAPES / 'qwen2.5-72b'}"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, "check", "--shapes-only", *arguments], check=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.0


def test_profiles_name_their_source() -> None:
    for name, profile in PROFILES.items():
        assert profile.name == name and profile.source
        assert 0 < profile.reserved_gib < profile.memory_gib
        assert profile.memory_gib * GIB > 0
