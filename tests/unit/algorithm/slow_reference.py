"""Every formula of `megatron_prime.algorithm` once more: plain Python floats, loops, no tensor arithmetic.

Responses are ragged lists of token values; groups are labels. Written from the equations, not from the fast code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Rows = list[list[float]]


def to_rows(values: torch.Tensor, mask: torch.Tensor) -> Rows:
    return [[float(v) for v, m in zip(row, keep, strict=True) if m] for row, keep in zip(values, mask, strict=True)]


def to_padded(rows: Rows, width: int) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64).reshape(-1, width)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def sample_std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def members(groups: Sequence[int], i: int) -> list[int]:
    return [j for j in range(len(groups)) if groups[j] == groups[i]]


def implicit_rewards(prm: Rows, reference: Rows, beta: float) -> Rows:
    return [[beta * (p - q) for p, q in zip(a, b, strict=True)] for a, b in zip(prm, reference, strict=True)]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def cross_entropy(logits: Sequence[float], labels: Sequence[float]) -> float:
    losses = [
        -y * math.log(sigmoid(z)) - (1 - y) * math.log(1 - sigmoid(z)) for z, y in zip(logits, labels, strict=True)
    ]
    return sum(losses) / len(losses)


def pairwise(logits: Sequence[float], labels: Sequence[float], groups: Sequence[int]) -> float:
    total = 0.0
    for i in range(len(logits)):
        opponents = [logits[j] for j in members(groups, i) if (labels[j] > 0.5) != (labels[i] > 0.5)]
        if opponents:
            sign = 1.0 if labels[i] > 0.5 else -1.0
            total -= math.log(sigmoid(sign * (logits[i] - mean(opponents))))
    return total / len(logits)


def leave_one_out(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    result = []
    for i, value in enumerate(values):
        others = [values[j] for j in members(groups, i) if j != i]
        result.append(value - mean(others) if others else 0.0)
    return result


def rloo_process(rewards: Rows, groups: Sequence[int], baseline: str) -> Rows:
    result = []
    for i, row in enumerate(rewards):
        means = {j: mean(rewards[j]) for j in members(groups, i) if rewards[j]}
        size = len(means)
        if size < 2:
            result.append([0.0] * len(row))
        elif baseline == "strict":
            others = mean([m for j, m in means.items() if j != i])
            result.append([r - others for r in row])
        else:
            result.append([r * size / (size - 1) - sum(means.values()) / (size - 1) for r in row])
    return result


def grpo_process(rewards: Rows, groups: Sequence[int]) -> Rows:
    result = []
    for i, row in enumerate(rewards):
        means = [mean(rewards[j]) for j in members(groups, i) if rewards[j]]
        std = sample_std(means)
        result.append([(r - mean(means)) / std if std > 1e-9 else 0.0 for r in row])
    return result


def discounted_returns(rewards: Rows, gamma: float) -> Rows:
    return [[sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))] for row in rewards]


def process_scale(rewards: Rows, mode: str, gamma: float) -> float:
    returns = [g for row in discounted_returns(rewards, gamma) for g in row]
    if mode == "max":
        return max(abs(g) for g in returns)
    if mode == "rms":
        return math.sqrt(mean([g * g for g in returns]))
    return 1.0


def whiten(values: Rows) -> Rows:
    flat = [v for row in values for v in row]
    std = sample_std(flat)
    if std <= 1e-6 * max(map(abs, flat), default=0.0):
        return [[0.0] * len(row) for row in values]
    return [[(v - mean(flat)) / math.sqrt(std**2 + 1e-8) for v in row] for row in values]


def advantages(
    outcomes: Sequence[float],
    process: Rows,
    groups: Sequence[int],
    *,
    estimator: str,
    baseline: str,
    coefs: tuple[float, float],
    gammas: tuple[float, float],
    scale: str,
    whitened: bool,
) -> Rows:
    if estimator == "rloo":
        outcome_values = leave_one_out(outcomes, groups)
    elif estimator == "grpo":
        outcome_values = [row[0] for row in grpo_process([[o] for o in outcomes], groups)]
    else:
        outcome_values = list(outcomes)
    divisor = process_scale(process, scale, gammas[1])
    scaled = [[r / divisor for r in row] for row in process]
    if estimator == "rloo":
        scaled = rloo_process(scaled, groups, baseline)
    elif estimator == "grpo":
        scaled = grpo_process(scaled, groups)
    process_returns = discounted_returns(scaled, gammas[1])
    total = []
    for value, row in zip(outcome_values, process_returns, strict=True):
        length = len(row)
        total.append([coefs[0] * value * gammas[0] ** (length - 1 - t) + coefs[1] * row[t] for t in range(length)])
    return whiten(total) if whitened else total


def policy_loss(
    logprobs: Rows,
    old: Rows,
    advantages: Rows,
    reference: Rows,
    *,
    low: float,
    high: float,
    dual: float | None,
    normalization: str,
    kl_coef: float,
) -> dict[str, float]:
    num_tokens = sum(len(row) for row in logprobs)
    num_rows = sum(1 for row in logprobs if row)
    result = {"loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0, "reference_kl": 0.0, "max_ratio": 0.0}
    for row in range(len(logprobs)):
        for t in range(len(logprobs[row])):
            weight = 1 / num_tokens if normalization == "token" else 1 / (num_rows * len(logprobs[row]))
            advantage = advantages[row][t]
            ratio = math.exp(logprobs[row][t] - old[row][t])
            loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
            if dual is not None and advantage < 0:
                loss = min(loss, -advantage * dual)
            log_q_p = reference[row][t] - logprobs[row][t]
            kl = math.exp(log_q_p) - 1 - log_q_p
            result["loss"] += weight * (loss + kl_coef * kl)
            result["clip_fraction"] += weight * (loss != -advantage * ratio)
            result["approx_kl"] += weight * (ratio - 1 - math.log(ratio))
            result["reference_kl"] += weight * kl
            result["max_ratio"] = max(result["max_ratio"], ratio)
    return result


def auc_pairs(scores: Sequence[float], labels: Sequence[float], groups: Sequence[int]) -> tuple[float, int]:
    won, pairs = 0.0, 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if groups[i] == groups[j] and labels[i] > 0.5 and labels[j] <= 0.5:
                pairs += 1
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return (won / pairs if pairs else math.nan), pairs
