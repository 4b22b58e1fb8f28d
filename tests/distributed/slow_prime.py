"""Three PRIME steps on fixed answers in float64, with transformers' model and torch's Adam: what layouts must do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_prime.algorithm.advantage import compute_advantages
from megatron_prime.batch import RolloutBatch
from megatron_prime.config.schema import AdvantageSection, OptimizerSection, PolicySection, PrmSection
from megatron_prime.mcore.packing import split_minibatches

NUM_STEPS = 3
TEMPERATURE = 0.8
# Adam divides each gradient by itself at first; a large epsilon keeps the size of the gradient in the step.
OPTIMIZER = OptimizerSection(lr=1e-2, adam_eps=1e-2, clip_grad=0.5, weight_decay=0.0)
POLICY = PolicySection(num_minibatches=2, optimizer=OPTIMIZER)
PRM = PrmSection(beta=0.5, optimizer=OPTIMIZER)
ADVANTAGE = AdvantageSection(process_gamma=0.9)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a run of three steps shows, the same on every rank."""

    logprobs: list[torch.Tensor]
    """[B, R] of policy, reference and PRM at each step."""
    numbers: list[float]
    """Losses and gradient norms of all updates, means over their mini-batches."""
    weights: dict[str, torch.Tensor]
    """Of policy and PRM after the last step."""


def make_batch(step: int) -> RolloutBatch:
    """Random answers of 1 to 17 tokens to two prompts."""
    generator = torch.Generator().manual_seed(40 + step)
    lengths = torch.tensor([5, 17, 1, 6, 12, 9, 7, 2]).roll(step)
    mask = torch.arange(17) < lengths[:, None]
    prompts = [tuple(range(2 + step, 9)), tuple(range(30, 33 + step))]
    return RolloutBatch(
        prompt_token_ids=tuple(prompts[row // 4] for row in range(8)),
        response_ids=torch.randint(2, 131, mask.shape, generator=generator) * mask,
        mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        outcomes=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
        group_index=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        weight_versions=torch.zeros(8, dtype=torch.int64),
    )


class SlowModel:
    """One model with Adam and gradient clipping."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=OPTIMIZER.lr, betas=betas, eps=OPTIMIZER.adam_eps)

    def logprobs(self, batch: RolloutBatch, rows: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Row by row, [rows, R], 0 on padding."""
        result = []
        for row in rows:
            prompt, response = batch.prompt_token_ids[row], batch.response_ids[row][batch.mask[row]]
            sequence = torch.cat((torch.tensor(prompt), response))[None]
            scores = (self.model(sequence).logits[0] / temperature).log_softmax(-1)
            picked = scores[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
            result.append(torch.nn.functional.pad(picked, (0, batch.mask.shape[1] - len(response))))
        return torch.stack(result)

    def step(self, loss: torch.Tensor) -> list[float]:
        """An optimizer step; returns the loss and the norm of the gradient before clipping."""
        self.adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_grad)
        self.adam.step()
        return [loss.item(), norm.item()]


def published_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained weights under the names of published models; transformers stacks the experts of a layer."""
    for name, parameter in model.named_parameters():
        layer = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        if parameter.dim() < 3:
            yield name, parameter.detach()
        elif name.endswith("down_proj"):
            yield from (
                (f"{layer}{expert}.down_proj.weight", parameter[expert].detach()) for expert in range(len(parameter))
            )
        else:
            half = parameter.shape[1] // 2
            for expert in range(len(parameter)):
                yield f"{layer}{expert}.gate_proj.weight", parameter[expert, :half].detach()
                yield f"{layer}{expert}.up_proj.weight", parameter[expert, half:].detach()


def slow_prime(folder: Path) -> Trace:
    """The reference run."""
    policy, prm, reference = (SlowModel(folder) for _ in range(3))
    logprobs, numbers = [], []
    everyone = range(8)
    for step in range(NUM_STEPS):
        batch = make_batch(step)
        with torch.no_grad():
            old = policy.logprobs(batch, everyone, TEMPERATURE)
            start = reference.logprobs(batch, everyone)
            before = prm.logprobs(batch, everyone)
        logprobs += [old, start, before]
        logits = PRM.beta * ((prm.logprobs(batch, everyone) - start) * batch.mask).sum(dim=1)
        numbers += prm.step(torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.outcomes.double()))
        rewards = PRM.beta * (before - start)
        advantages = compute_advantages(batch.outcomes, rewards, batch.mask, batch.group_index, ADVANTAGE).advantages
        steps = []
        for rows in split_minibatches(batch.group_index, POLICY.num_minibatches, step):
            ratio = (policy.logprobs(batch, rows, TEMPERATURE) - old[rows]).exp()
            clipped = ratio.clamp(1 - POLICY.clip_ratio_low, 1 + POLICY.clip_ratio_high)
            gain = torch.minimum(ratio * advantages[rows], clipped * advantages[rows])
            steps.append(policy.step(-gain[batch.mask[rows]].mean()))
        numbers += torch.tensor(steps).mean(dim=0).tolist()
    weights = {
        f"{name}/{key}": tensor
        for name, model in (("policy", policy), ("prm", prm))
        for key, tensor in published_weights(model.model)
    }
    return Trace(logprobs=logprobs, numbers=numbers, weights=weights)
