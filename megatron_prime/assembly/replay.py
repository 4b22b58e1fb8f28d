"""Runs an update again that was NaN or Inf, response by response, to see which one is the cause."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_prime import collectives
from megatron_prime.assembly.run import role_setup
from megatron_prime.batch import ModelUpdate, PolicyUpdate, PrmBatch, RolloutBatch, ScoredBatch
from megatron_prime.checkpoint.manifest import committed, step_of
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.data.tokenizer import load_tokenizer
from megatron_prime.errors import ConfigError
from megatron_prime.mcore.checkpoint.state import load_weights
from megatron_prime.mcore.parallel import parallel_layout
from megatron_prime.mcore.prime_roles import PolicyRole, PrmRole
from megatron_prime.observe.failed_updates import FailedUpdate, read_failed_update
from megatron_prime.observe.run_folder import RunFolder
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.hf_folder import HfFolder

_NUM_ROWS = 20
_NUM_CHARACTERS = 300


Weights = Literal["checkpoint", "start"]
"""The newest checkpoint from before the update, if there is one; or what the run started from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedResponse:
    """One response of an update by itself."""

    batch: int
    """Of the PRM's window, 0 is the oldest."""
    row: int
    group: int
    num_tokens: int
    outcome: float
    not_finite_before: tuple[str, ...]
    """What came into the update and was infinite or no number already."""
    loss: float
    """Its part of the whole batch's loss."""
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether it could be trained on."""
        return not self.not_finite_before and math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def replay_config(file: Path) -> PrimeConfig:
    """The run's configuration without data parallelism, which is how a replay runs."""
    config = read_failed_update(file).config
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    # Experts that data-parallel ranks shared out: as many as the fewer ranks can.
    num_expert_ranks = math.gcd(parallel.expert_model_parallel_size, size // parallel.pipeline_model_parallel_size)
    alone = replace(parallel, world_size=size, expert_model_parallel_size=num_expert_ranks)
    return replace(config, parallel=alone)


def replay(file: Path, weights: Weights) -> list[str]:
    """Runs an update again; collective over the processes of `replay_config`.

    Args:
        file: of the folder ``failures`` of a run.
        weights: of which moment.

    Returns:
        Lines for the user. All responses go into a JSON file beside the update's.

    Raises:
        DataError: the file is no failed update.
        ConfigError: the run's starting model is gone.
    """
    failed, config = read_failed_update(file), replay_config(file)
    folder = RunFolder(file.resolve().parents[2], file.resolve().parents[1].name)
    torch.set_num_threads(config.run.num_threads)
    with parallel_layout(config.parallel, config.run.seed) as layout:
        start = config.model.path
        if failed.update.role == "prm" and config.prm.path is not None:
            start = config.prm.path
        if not Path(start).is_dir():
            raise ConfigError(f"{start}: no such folder; put the run's starting model back there")
        setup = role_setup(config, read_architecture(start), layout, folder)
        role: PolicyRole | PrmRole
        if failed.update.role == "policy":
            role = PolicyRole(setup, config.policy, num_steps=config.run.num_steps)
        else:
            role = PrmRole(setup, config.prm, num_steps=config.run.num_steps)
        source = _load_weights(role, start, failed.update, weights, folder)
        responses = _measured(role, failed.update, config.rollout.temperature)
        if collectives.is_main():
            content = {"weights": source, "responses": [asdict(response) for response in responses]}
            file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        collectives.barrier()
    return _lines(failed, source, responses, file)


def _load_weights(
    role: PolicyRole | PrmRole, start: str, update: ModelUpdate, weights: Weights, folder: RunFolder
) -> str:
    """Loads the weights and says which they are."""
    checkpoints = {step_of(path): path for path in committed(folder.checkpoints)}
    earlier = [step for step in checkpoints if step < update.step]
    if weights == "checkpoint" and earlier:
        newest = max(earlier)
        load_weights(role.chunks, checkpoints[newest] / update.role)
        exact = "the update's own" if newest == update.step - 1 else f"{update.step - 1 - newest} steps before it"
        return f"{checkpoints[newest]}, {exact}"
    role.load_hf(HfFolder(start))
    return f"{start}, the start, {update.step - 1} steps before the update"


def _measured(role: PolicyRole | PrmRole, update: ModelUpdate, temperature: float) -> list[ReplayedResponse]:
    if isinstance(update, PolicyUpdate):
        assert isinstance(role, PolicyRole)
        found = role.measure_rows(update.batch, update.advantages, temperature=temperature)
        inputs = _inputs(update.batch) | {"advantages": update.advantages}
        return [_response(0, row, update.batch.rollout, inputs, metrics) for row, metrics in enumerate(found)]
    assert isinstance(role, PrmRole)
    return [
        _response(number, row, batch.rollout, _inputs(batch), metrics)
        for number, batch in enumerate(update.batches)
        for row, metrics in enumerate(role.measure_rows(batch))
    ]


def _inputs(batch: ScoredBatch | PrmBatch) -> dict[str, torch.Tensor | None]:
    """What a batch brought into the update, by name."""
    scores = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "rollout"}
    return {"outcome": batch.rollout.outcomes, "rollout_logprobs": batch.rollout.rollout_logprobs, **scores}


def _response(
    number: int,
    row: int,
    rollout: RolloutBatch,
    inputs: Mapping[str, torch.Tensor | None],
    metrics: Mapping[str, float],
) -> ReplayedResponse:
    bad = tuple(name for name, x in inputs.items() if x is not None and not bool(x[row].isfinite().all()))
    return ReplayedResponse(
        batch=number,
        row=row,
        group=int(rollout.group_index[row]),
        num_tokens=int(rollout.mask[row].sum()),
        outcome=float(rollout.outcomes[row]),
        not_finite_before=bad,
        loss=metrics["loss"],
        grad_norm=metrics["grad_norm"],
    )


def _lines(failed: FailedUpdate, source: str, responses: Sequence[ReplayedResponse], file: Path) -> list[str]:
    update, guilty = failed.update, [response for response in responses if not response.is_finite]
    lines = [f"{update.role} update of step {update.step}: {failed.reason}", f"weights: {source}"]
    lines.append(f"{'batch':>5} {'row':>4} {'group':>5} {'tokens':>6} {'outcome':>7} {'loss':>11} {'grad norm':>11}")
    largest = sorted(responses, key=lambda response: (response.is_finite, -response.grad_norm))
    for r in largest[:_NUM_ROWS]:
        before = f"  came in not finite: {', '.join(r.not_finite_before)}" if r.not_finite_before else ""
        lines.append(
            f"{r.batch:>5} {r.row:>4} {r.group:>5} {r.num_tokens:>6} {r.outcome:>7.3g} {r.loss:>11.4g}"
            f" {r.grad_norm:>11.4g}{before}"
        )
    lines.append(f"all {len(responses)}: {file.with_suffix('.json')}")
    if not guilty:
        lines.append("with these weights every response by itself is finite: look at the weights and the learning rate")
    elif len(guilty) == len(responses):
        lines.append("all responses are at fault: look at what they have in common, coefficients and weights first")
    else:
        rows = ", ".join(str(response.row) for response in guilty)
        lines += [f"at fault: rows {rows}", *_text_of(failed, guilty[0])]
    return lines


def _text_of(failed: FailedUpdate, response: ReplayedResponse) -> list[str]:
    update = failed.update
    batch = update.batch if isinstance(update, PolicyUpdate) else update.batches[response.batch]
    rollout = batch.rollout
    tokens = rollout.response_ids[response.row][rollout.mask[response.row]].tolist()
    text = load_tokenizer(failed.config.model.path).decode(tokens)
    return [f"response {response.row} begins: {str(text)[:_NUM_CHARACTERS]!r}"]
