"""The plan of a run: its phases, its peak, what waits in host memory, and how fast it answers."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from recipes import PUBLISHED_PARAMETERS, ROOT, SHAPES, plan_of

from megatron_prime.commands.main import main


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


def test_a_plan_that_does_not_fit_is_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "configs" / "prime_qwen2.5_32b.yaml"), f"model.path={SHAPES / 'qwen2.5-32b'}"]
    assert main(["check", "--shapes-only", *arguments, "parallel.pipeline_model_parallel_size=1"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


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
