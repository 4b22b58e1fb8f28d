"""Tries a user's own estimator, process rewards and losses on a small made-up batch, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron_prime.algorithm.implicit_reward import step_rewards
from megatron_prime.algorithm.policy_loss import PolicyTokens
from megatron_prime.algorithm.prm_loss import PrmResponses
from megatron_prime.batch import Group, ProcessInputs, Prompt, Response, RolloutBatch
from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.errors import ConfigError
from megatron_prime.sockets import is_own, resolve

_LENGTHS = (4, 2, 3, 1)
_OUTCOMES = (1.0, 0.0, 0.0, 1.0)
_TOLERANCE = 1e-4


def check_own_algorithm(config: AnyConfig) -> list[str]:
    """Problems of the user's own parts of the algorithm; what is built in is not tried."""
    if not isinstance(config, PrimeConfig):
        return []
    parts: list[tuple[str, str, Callable[[Any, PrimeConfig], None]]] = [
        ("advantage.estimator", config.advantage.estimator, _try_estimator),
        ("advantage.process_source", config.advantage.process_source, _try_process_source),
        ("prm.loss", config.prm.loss, _try_prm_loss),
        ("policy.loss", config.policy.loss, _try_policy_loss),
    ]
    problems: list[str] = []
    for key, name, attempt in parts:
        if not is_own(key, name):
            continue
        try:
            attempt(resolve(key, name), config)
        except ConfigError as error:
            problems += error.problems
        except Exception as error:
            # It is the user's code: whatever it raises is what is wrong with it.
            problems.append(f"{key}: {name!r} tried on a made-up batch: {type(error).__name__}: {error}")
    return problems


def made_up_inputs() -> ProcessInputs:
    """Two prompts with two answers each, of 4, 2, 3 and 1 tokens, without a PRM."""
    groups = []
    for number in range(2):
        prompt = Prompt(prompt_id=str(number), text="1+1=?", token_ids=(1, 2, 3), ground_truth="2")
        rows = range(2 * number, 2 * number + 2)
        answers = tuple(
            Response(
                text="1+1=2;"[: _LENGTHS[row]],
                token_ids=tuple(range(5, 5 + _LENGTHS[row])),
                logprobs=(-0.5,) * _LENGTHS[row],
                finish_reason="stop",
                weight_version=0,
            )
            for row in rows
        )
        groups.append(Group(prompt=prompt, responses=answers, rewards=tuple(_OUTCOMES[row] for row in rows)))
    return ProcessInputs(groups=tuple(groups), rollout=RolloutBatch.from_groups(groups), prm=None, beta=0.05)


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _expect_tensor(value: Any, shape: torch.Size, what: str) -> None:
    _expect(isinstance(value, torch.Tensor), f"{what} is a {type(value).__name__}, not a torch.Tensor")
    _expect(value.shape == shape, f"{what} has shape {list(value.shape)}, not {list(shape)}")
    _expect(bool(value.isfinite().all()), f"{what} has NaN or Inf")


@contextmanager
def _unchanged(*tensors: torch.Tensor) -> Iterator[None]:
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    same = all(torch.equal(old, tensor.detach()) for old, tensor in zip(before, tensors, strict=True))
    _expect(same, "it changes its arguments; other code reads them too")


def _try_estimator(function: Any, config: PrimeConfig) -> None:
    batch = made_up_inputs().rollout
    process = torch.where(batch.mask, torch.linspace(-1, 2, 16).view(4, 4), 0.0)
    outcomes, everywhere = batch.outcomes[:, None].clone(), torch.ones(len(_LENGTHS), 1, dtype=torch.bool)
    for rewards, valid in ((process, batch.mask), (outcomes, everywhere)):
        with _unchanged(rewards, valid):
            result = function(rewards, valid, batch.group_index, config.advantage)
        _expect_tensor(result, rewards.shape, f"its result for rewards {list(rewards.shape)}")
        _expect(bool((result[~valid] == 0).all()), "its result is not 0 on padding (where the mask is False)")


def _try_process_source(function: Any, config: PrimeConfig) -> None:
    inputs = replace(made_up_inputs(), beta=config.prm.beta)
    mask = inputs.rollout.mask
    with _unchanged(inputs.rollout.response_ids, mask, inputs.rollout.outcomes):
        result = function(inputs)
    if not isinstance(result, torch.Tensor):
        result = step_rewards(result, mask)
    _expect_tensor(result, mask.shape, "what it returned for 4 answers of at most 4 tokens")


def _try_prm_loss(function: Any, config: PrimeConfig) -> None:
    batch = made_up_inputs().rollout
    logprobs = torch.where(batch.mask, -torch.linspace(0.1, 2, 16).view(4, 4), 0.0).requires_grad_()
    opponents = torch.tensor([0.2, -0.1, 0.3, 0.1]) if getattr(function, "needs_scores", False) else None

    def loss_of(rows: list[int]) -> torch.Tensor:
        return function(
            PrmResponses(
                prm_logprobs=logprobs[rows],
                reference_logprobs=torch.where(batch.mask, -1.0, 0.0)[rows],
                mask=batch.mask[rows],
                labels=batch.outcomes[rows],
                group_accuracy=torch.full((len(rows),), 0.5),
                group_size=torch.full((len(rows),), 2.0),
                opponents=None if opponents is None else opponents[rows],
                num_responses=len(_LENGTHS),
                section=config.prm,
            )
        )

    whole = loss_of([0, 1, 2, 3])
    _expect_tensor(whole, torch.Size(()), "the loss")
    _expect(whole.requires_grad, "the loss has no gradient; it must depend on prm_logprobs")
    (gradient,) = torch.autograd.grad(whole, logprobs)
    _expect_tensor(gradient, logprobs.shape, "its gradient by prm_logprobs")
    parts = float((loss_of([0]) + loss_of([1, 2]) + loss_of([3])).detach())
    _expect(
        abs(float(whole.detach()) - parts) <= _TOLERANCE * max(1.0, abs(parts)),
        f"the losses of parts of a mini-batch add up to {parts:.6g}, that of the whole is {float(whole.detach()):.6g}; "
        "divide a sum over responses by num_responses",
    )


def _try_policy_loss(function: Any, config: PrimeConfig) -> None:
    batch = made_up_inputs().rollout
    count = int(batch.mask.sum())
    logprobs = (-torch.linspace(0.1, 2, count)).requires_grad_()
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=-torch.linspace(0.2, 1.5, count),
        advantages=torch.linspace(-1, 1, count),
        weights=torch.full((count,), 1 / count),
        sequences=batch.mask.nonzero()[:, 0],
    )
    with _unchanged(logprobs, tokens.advantages, tokens.old_logprobs):
        result = function(tokens, config.policy)
    _expect(isinstance(result, tuple) and len(result) == 2, "it must return (losses, is_cut), both one per token")
    losses, is_cut = result
    _expect_tensor(losses, logprobs.shape, "its losses")
    _expect_tensor(is_cut, logprobs.shape, "is_cut")
    _expect(losses.requires_grad, "its losses have no gradient; they must depend on logprobs")
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    _expect_tensor(gradient, logprobs.shape, "its gradient by logprobs")
