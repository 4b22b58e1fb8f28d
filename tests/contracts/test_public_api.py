"""The names that users and other rooms build on. A change here is a change of the interface."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_prime
from megatron_prime import algorithm, batch

PACKAGE = [
    "AdvantageSection",
    "Case",
    "Engine",
    "EngineSetup",
    "ExportedWeights",
    "Group",
    "LoggerRequest",
    "MetricsLogger",
    "PolicySection",
    "PolicyTokens",
    "PrimeConfig",
    "PrimeError",
    "PrmResponses",
    "PrmSection",
    "ProcessInputs",
    "Prompt",
    "PromptRequest",
    "PromptSource",
    "PromptSourceBase",
    "Response",
    "RolloutBatch",
    "SamplingParams",
    "SftConfig",
    "StepReward",
    "StepSpan",
    "Verdict",
    "Verifier",
    "algorithm",
    "check_verifier",
    "generate",
    "is_main",
    "load_config",
    "resolve",
    "train",
]
REQUESTS = {
    "LoggerRequest": "folder run_name num_steps config resume_step is_trial",
    "PromptRequest": "tokenizer options seed max_prompt_tokens",
}
"""What the makers of a user's own parts are given."""
PARTS = {
    "Engine": "close generate load_weights sleep wake weight_version",
    "MetricsLogger": "close log",
    "PromptSource": "__len__ dropped evaluation step_spans take",
    "Verifier": "close submit",
}
"""Members of what a user's own parts must be."""
ALGORITHM = [
    "AdvantageResult",
    "FilterCounts",
    "GroupCollector",
    "GroupedAuc",
    "PolicyLossMetrics",
    "PolicyTokens",
    "PrmResponses",
    "auc",
    "auc_gate",
    "compute_advantages",
    "cross_entropy_loss",
    "discounted_returns",
    "grouped_auc",
    "grpo_process",
    "implicit_rewards",
    "keep_group",
    "leave_one_out",
    "loss_weights",
    "opponent_logits",
    "outcome_labels",
    "pairwise_loss",
    "policy_loss",
    "ppo_clip",
    "rloo_process",
    "scale_process",
    "sequence_logits",
    "step_rewards",
    "step_scores",
    "whiten",
]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
BATCH = {
    "Prompt": "prompt_id text token_ids ground_truth ability data_source extra_info",
    "Response": "text token_ids logprobs finish_reason weight_version spans_versions",
    "SamplingParams": "num_responses temperature top_p max_response_tokens seed stop_token_ids",
    "StepSpan": "start stop correct",
    "SftExample": "prompt_token_ids response_token_ids",
    "Verdict": "status reward extracted seconds reason",
    "Group": "prompt responses rewards",
    "RolloutBatch": "prompt_token_ids response_ids mask rollout_logprobs outcomes group_index weight_versions",
    "ScoredBatch": "rollout policy_logprobs reference_logprobs prm_logprobs",
    "PrmBatch": "rollout reference_logprobs prm_logprobs",
    "StepReward": "start stop reward",
    "ProcessInputs": "groups rollout prm beta",
    "PrmUpdate": "step batches seed",
    "PolicyUpdate": "step batch advantages seed",
    "UpdateResult": "metrics logprobs",
}


@pytest.mark.parametrize(("module", "names"), [(megatron_prime, PACKAGE), (algorithm, ALGORITHM)])
def test_public_names(module, names):
    assert module.__all__ == names
    assert set(names) <= set(dir(module))
    for name in names:
        assert getattr(module, name).__doc__.strip()


def test_requests_and_parts():
    requests = {name: getattr(megatron_prime, name) for name in REQUESTS}
    assert {name: " ".join(f.name for f in dataclasses.fields(cls)) for name, cls in requests.items()} == REQUESTS
    assert all(cls.__dataclass_params__.frozen for cls in requests.values())
    assert {name: " ".join(sorted(members(getattr(megatron_prime, name)))) for name in PARTS} == PARTS


def members(protocol: type) -> set[str]:
    named = {*vars(protocol), *inspect.get_annotations(protocol)}
    return {name for name in named if not name.startswith("_") or name == "__len__"}


def test_batch_dataclasses():
    classes = {
        name: cls
        for name, cls in vars(batch).items()
        if dataclasses.is_dataclass(cls) and cls.__module__ == batch.__name__
    }
    assert {name: " ".join(f.name for f in dataclasses.fields(cls)) for name, cls in classes.items()} == BATCH
    for cls in classes.values():
        assert cls.__dataclass_params__.frozen and "__slots__" in vars(cls)
        assert all(field.kw_only for field in dataclasses.fields(cls))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_confg'"):
        megatron_prime.load_confg  # noqa: B018


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_build_on_public_names_alone(example):
    for node in ast.walk(ast.parse(example.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        ours = {module for module in modules if module.split(".")[0] == "megatron_prime"}
        assert ours <= {"megatron_prime", "megatron_prime.algorithm"}


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import megatron_prime", {"torch", "numpy", "omegaconf", "yaml"}),
        ("from megatron_prime import PrimeError, load_config", {"torch", "numpy", "transformers"}),
        ("from megatron_prime import PromptSourceBase, Verdict", {"megatron", "vllm", "datasets"}),
        ("from megatron_prime import LoggerRequest", {"megatron", "tensorboard", "wandb"}),
        ("from megatron_prime import algorithm; algorithm.auc", {"megatron", "transformers"}),
    ],
)
def test_a_name_loads_only_what_it_needs(program, absent):
    program += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "megatron_prime" in loaded and loaded.isdisjoint(absent)
