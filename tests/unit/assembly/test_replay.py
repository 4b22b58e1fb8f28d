"""A failed update run again, response by response: which of them are at fault, with which weights, on what ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import prime_config, small_model_folder, write_yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.assembly.replay import replay, replay_config
from megatron_prime.batch import PolicyUpdate, PrmBatch, PrmUpdate, RolloutBatch, ScoredBatch
from megatron_prime.config import PrimeConfig
from megatron_prime.config.loader import load_config
from megatron_prime.errors import ConfigError
from megatron_prime.observe.failed_updates import FailedUpdateFiles

MASK = torch.arange(4) < torch.tensor([4, 2, 3, 1])[:, None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_model_folder(tmp_path_factory.mktemp("models") / "random")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


def make_rollout() -> RolloutBatch:
    generator = torch.Generator().manual_seed(2)
    return RolloutBatch(
        prompt_token_ids=((5, 6), (5, 6), (7, 8), (7, 8)),
        response_ids=torch.randint(3, 20, MASK.shape, generator=generator) * MASK,
        mask=MASK,
        rollout_logprobs=torch.full(MASK.shape, -2.0) * MASK,
        outcomes=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        group_index=torch.tensor([0, 0, 1, 1]),
        weight_versions=torch.zeros(4, dtype=torch.int64),
    )


def policy_update(**changes: Any) -> PolicyUpdate:
    batch = ScoredBatch(
        rollout=make_rollout(),
        policy_logprobs=torch.full(MASK.shape, -2.0) * MASK,
        reference_logprobs=None,
        prm_logprobs=None,
    )
    update = PolicyUpdate(step=3, batch=batch, advantages=torch.ones(MASK.shape) * MASK, seed=1)
    return replace(update, **changes)


def prm_update(**scores: Any) -> PrmUpdate:
    plain = {"reference_logprobs": torch.full(MASK.shape, -2.0) * MASK}
    plain |= {"prm_logprobs": torch.full(MASK.shape, -2.5) * MASK}
    older = PrmBatch(rollout=make_rollout(), **plain)
    return PrmUpdate(step=3, batches=(older, PrmBatch(rollout=make_rollout(), **(plain | scores))), seed=1)


def keep(directory: Path, model: Path, update: PolicyUpdate | PrmUpdate, **sections: Any) -> Path:
    """The file of a failed update in a run's folder."""
    content = prime_config(str(model), str(directory), "run", **sections)
    config = load_config(write_yaml(directory / "run.yaml", content))
    assert isinstance(config, PrimeConfig)
    return FailedUpdateFiles(directory / "run" / "failures", config).keep(update, "not finite: loss nan")


def responses_in(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.with_suffix(".json").read_text())["responses"]


def test_the_one_response_that_is_at_fault_is_named_with_its_text(tmp_path: Path, model: Path) -> None:
    advantages = torch.ones(MASK.shape) * MASK
    advantages[2, 1] = torch.inf
    file = keep(tmp_path, model, policy_update(advantages=advantages))
    lines = replay(file, "start")
    assert lines[0] == "policy update of step 3: not finite: loss nan"
    assert lines[1] == f"weights: {model}, the start, 2 steps before the update"
    assert "came in not finite: advantages" in lines[3], "the worst one comes first"
    assert lines[-2] == "at fault: rows 2" and lines[-1].startswith("response 2 begins: ")
    rows = responses_in(file)
    assert [row["not_finite_before"] for row in rows] == [[], [], ["advantages"], []]
    assert [(row["num_tokens"], row["group"]) for row in rows] == [(4, 0), (2, 0), (3, 1), (1, 1)]


def test_responses_that_are_finite_by_themselves_put_the_weights_under_suspicion(tmp_path: Path, model: Path) -> None:
    file = keep(tmp_path, model, policy_update())
    assert "look at the weights and the learning rate" in replay(file, "checkpoint")[-1]
    assert all(0 < row["grad_norm"] < 1e3 for row in responses_in(file))


def test_where_all_are_at_fault_it_is_what_they_have_in_common(tmp_path: Path, model: Path) -> None:
    file = keep(tmp_path, model, policy_update(advantages=torch.where(MASK, torch.nan, 0.0)))
    assert "all responses are at fault" in replay(file, "start")[-1]


def test_a_prms_update_is_looked_at_batch_by_batch(tmp_path: Path, model: Path) -> None:
    scores = torch.full(MASK.shape, -2.0) * MASK
    scores[1, 0] = -torch.inf
    file = keep(tmp_path, model, prm_update(reference_logprobs=scores))
    lines = replay(file, "start")
    assert lines[0].startswith("prm update of step 3")
    rows = responses_in(file)
    assert [(row["batch"], row["row"]) for row in rows] == [(b, r) for b in range(2) for r in range(4)]
    bad = [(row["batch"], row["row"]) for row in rows if row["not_finite_before"]]
    assert bad == [(1, 1)] and lines[-2] == "at fault: rows 1"


def test_a_starting_model_that_is_gone_is_asked_for(tmp_path: Path, model: Path) -> None:
    file = keep(tmp_path, model, policy_update())
    content = torch.load(file, weights_only=True)
    content["config"]["model"]["path"] = str(tmp_path / "gone")
    torch.save(content, file)
    with pytest.raises(ConfigError, match="gone: no such folder; put the run's starting model back there"):
        replay(file, "start")


def test_a_replay_has_no_data_parallel_ranks_and_fewer_that_share_experts(tmp_path: Path, model: Path) -> None:
    file = keep(tmp_path, model, policy_update())
    content = torch.load(file, weights_only=True)
    wide = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}
    content["config"]["parallel"] |= wide | {"world_size": 16}
    torch.save(content, file)
    parallel = replay_config(file).parallel
    assert (parallel.world_size, parallel.expert_model_parallel_size) == (4, 2)
