"""Every shipped configuration loads, agrees with its model's shape and says what its source says."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prime.config import PrimeConfig, check_config, load_config, save_config
from megatron_prime.planner.batch_plan import batch_plan
from megatron_prime.weights.architecture import read_architecture

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHAPES = {
    "arithmetic.yaml": "configs/models/arithmetic",
    "arithmetic_sft.yaml": "configs/models/arithmetic",
    "prime_qwen2.5_math_7b.yaml": "configs/models/shapes/qwen2.5-math-7b",
    "prime_qwen2.5_32b.yaml": "configs/models/shapes/qwen2.5-32b",
    "prime_qwen2.5_72b.yaml": "configs/models/shapes/qwen2.5-72b",
    "prime_qwen2.5_math_7b_8xa100.yaml": "configs/models/shapes/qwen2.5-math-7b",
    "prime_llama3.1_8b.yaml": "configs/models/shapes/llama-3.1-8b",
    "prime_llama3.1_70b.yaml": "configs/models/shapes/llama-3.1-70b",
    "prime_qwen3_8b.yaml": "configs/models/shapes/qwen3-8b",
}


def test_every_config_names_its_model_here():
    assert {path.name for path in CONFIGS} == set(SHAPES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_is_sound(path, tmp_path):
    # Weights and data files are the user's to fetch; the shapes are in the repository.
    shape = ROOT / SHAPES[path.name]
    config = load_config(path, [f"model.path={shape}"])
    assert check_config(config, read_architecture(shape), check_files=False) == []
    assert all(text for _, text in batch_plan(config))
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("prime_")])
def test_recipes_carry_the_published_hyperparameters(name):
    config = load_config(ROOT / "configs" / name)
    assert isinstance(config, PrimeConfig)
    assert config.rollout.num_prompts * config.rollout.num_responses == 1024
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_tokens) == (1.0, 1.0, 3072)
    assert (config.policy.optimizer.lr, config.policy.optimizer.weight_decay) == (5e-7, 0.01)
    assert (config.policy.optimizer.clip_grad, config.policy.num_minibatches) == (1.0, 4)
    assert (config.prm.optimizer.lr, config.prm.optimizer.clip_grad, config.prm.num_minibatches) == (1e-6, 10.0, 4)
    assert (config.prm.beta, config.prm.loss, config.prm.update) == (0.05, "cross_entropy", "after")
    assert (config.filter.min_accuracy, config.filter.max_accuracy) == (0.2, 0.8)
    assert (config.policy.clip_ratio_low, config.policy.clip_ratio_high, config.policy.kl_coef) == (0.2, 0.2, 0.0)
    assert (config.advantage.estimator, config.advantage.outcome_coef, config.advantage.process_coef) == ("rloo", 1, 1)
    assert config.run.num_steps == 592


def test_demo_starts_from_what_its_supervised_run_leaves():
    prime, sft = (load_config(ROOT / "configs" / name) for name in ("arithmetic.yaml", "arithmetic_sft.yaml"))
    assert Path(prime.model.path) == Path(sft.run.directory) / sft.run.name / "hf"
    assert sft.checkpoint.export_hf
    assert prime.data == sft.data
    assert prime.parallel.world_size == sft.parallel.world_size == 2


def test_configuration_page_is_up_to_date():
    command = [sys.executable, str(ROOT / "tools" / "make_configuration_doc.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
