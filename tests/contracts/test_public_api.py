"""The names that users and other rooms build on. A change here is a change of the interface."""

import dataclasses
import subprocess
import sys

import pytest

import megatron_prime
from megatron_prime import algorithm, batch

PACKAGE = ["PrimeConfig", "PrimeError", "SftConfig", "algorithm", "load_config"]
ALGORITHM = [
    "AdvantageOptions",
    "AdvantageResult",
    "FilterCounts",
    "GroupCollector",
    "GroupedAuc",
    "PolicyLossMetrics",
    "PolicyLossOptions",
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
    "ppo_clip_loss",
    "rloo_process",
    "scale_process",
    "sequence_logits",
    "step_scores",
    "whiten",
]
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
    "ModelUpdate": "role step batches advantages seed",
    "UpdateResult": "metrics logprobs",
}


@pytest.mark.parametrize(("module", "names"), [(megatron_prime, PACKAGE), (algorithm, ALGORITHM)])
def test_public_names(module, names):
    assert module.__all__ == names
    assert set(names) <= set(dir(module))
    for name in names:
        assert getattr(module, name).__doc__.strip()


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


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import megatron_prime", {"torch", "numpy", "omegaconf", "yaml"}),
        ("from megatron_prime import PrimeError, load_config", {"torch", "numpy", "transformers"}),
        ("from megatron_prime import algorithm; algorithm.auc", {"megatron", "transformers", "omegaconf"}),
    ],
)
def test_a_name_loads_only_what_it_needs(program, absent):
    program += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "megatron_prime" in loaded and loaded.isdisjoint(absent)
