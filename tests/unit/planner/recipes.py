"""Recipes and shapes that plans are made of."""

from __future__ import annotations

from pathlib import Path

from megatron_prime.config import PrimeConfig, load_config
from megatron_prime.planner.hardware import PROFILES
from megatron_prime.planner.plan import Plan, make_plan
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture

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
