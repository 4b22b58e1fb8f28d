"""Accuracy with its interval, and what the PRM is known to know, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scripted_parts import NumberedPrompts, ScriptedEngine, ScriptVerifier

from megatron_prime.batch import (
    Group,
    PrmBatch,
    ProcessInputs,
    Prompt,
    Response,
    RolloutBatch,
    SamplingParams,
    StepSpan,
    Verdict,
)
from megatron_prime.config.schema import PrmSection
from megatron_prime.rollout.randomness import answer_key
from megatron_prime.trainer.evaluation import accuracy, derive_seed, sample_and_verify, wilson_interval
from megatron_prime.trainer.evidence import Evidence, measure_evidence, recent_step_auc


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        # Published values of the score interval, to four digits.
        (0.5, 10, 0.2366, 0.7634),
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.2, 5, 0.0362, 0.6245),
        (0.4, 1000, 0.3701, 0.4307),
    ],
)
def test_wilson_interval(share: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_quadratic() -> None:
    # The ends are where the score test is just significant: |share - p| = z * sqrt(p (1 - p) / n).
    for share, count in ((0.3, 7), (0.81, 400)):
        for end in wilson_interval(share, count):
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_nothing_seen_says_nothing() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
    nothing = accuracy([])
    assert (nothing.value, nothing.low, nothing.high, nothing.num_prompts) == (0.0, 0.0, 1.0, 0)


def verdict(mark: str) -> Verdict:
    return Verdict(status="", reward={"1": 1.0, "0": 0.0, "?": None}[mark])


def test_accuracy_is_the_mean_over_prompts() -> None:
    result = accuracy([[verdict(mark) for mark in row] for row in ("11", "10", "00", "10")])
    assert result.value == 0.5
    assert (result.low, result.high) == wilson_interval(0.5, 4)
    assert (result.num_prompts, result.num_missing) == (4, 0)


def test_missing_verdicts_earn_nothing_and_widen_the_interval(caplog) -> None:
    result = accuracy([[verdict(mark) for mark in row] for row in ("1?", "??", "0?1", "00")])
    assert result.value == pytest.approx((1 / 2 + 0 + 1 / 3 + 0) / 4)
    assert (result.num_prompts, result.num_missing, result.num_answers) == (4, 4, 9)
    best = (1 + 1 + 2 / 3 + 0) / 4
    assert (result.low, result.high) == (wilson_interval(result.value, 4)[0], wilson_interval(best, 4)[1])
    assert result.metrics()["evaluation/missing"] == pytest.approx(4 / 9)
    assert "4 of 9 answers have no verdict" in caplog.text


def test_one_right_answer_among_failures_is_not_all_right() -> None:
    assert accuracy([[verdict("1")], *[[verdict("?")]] * 9]).value == pytest.approx(0.1)


def test_answers_keep_their_prompts() -> None:
    engine = ScriptedEngine(["10", "0?", "11"])
    sampling = SamplingParams(num_responses=2, temperature=1.0, top_p=1.0, max_response_tokens=4, seed=0)
    rows = sample_and_verify(engine, ScriptVerifier(), NumberedPrompts().take(0, 3), sampling)
    assert [[(response.text, v.reward) for response, v in row] for row in rows] == [
        [("1", 1.0), ("0", 0.0)],
        [("0", 0.0), ("?", None)],
        [("1", 1.0), ("1", 1.0)],
    ]


def test_a_prompt_that_is_there_twice_gets_answers_of_its_own() -> None:
    engine = ScriptedEngine(["11"], held_out="01")
    sampling = SamplingParams(num_responses=2, temperature=1.0, top_p=1.0, max_response_tokens=4, seed=0)
    first, second = NumberedPrompts().evaluation(2)
    prompts = [first, second, first, first]
    rows = sample_and_verify(engine, ScriptVerifier(), prompts, sampling)
    assert len(rows) == 4
    keys = {answer_key(0, name, answer) for name in engine.requests[0][0] for answer in range(2)}
    assert len(keys) == 8


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(1, "rollout", 0), derive_seed(1, "rollout", 1), derive_seed(2, "rollout", 0)}
    assert len(seeds | {derive_seed(1, "order", 0), derive_seed(1, "rollout0")}) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "rollout", 0) == 2759356832279802361  # the same on every machine and in every version


BETA = 0.5
# (outcome, log-ratio of each token): two prompts with two answers each.
ANSWERS = [[(1.0, (2.0, 1.0)), (0.0, (1.0, -1.0, -2.0))], [(0.0, (1.0,)), (1.0, (0.5, 0.0))]]


def hand_made() -> tuple[ProcessInputs, torch.Tensor]:
    groups = []
    for number, answers in enumerate(ANSWERS):
        prompt = Prompt(prompt_id=str(number), text="", token_ids=(1,), ground_truth="")
        responses = tuple(
            Response(
                text=f"{number}{i}",
                token_ids=(5,) * len(ratios),
                logprobs=(0.0,) * len(ratios),
                finish_reason="stop",
                weight_version=0,
            )
            for i, (_, ratios) in enumerate(answers)
        )
        groups.append(Group(prompt=prompt, responses=responses, rewards=tuple(outcome for outcome, _ in answers)))
    rollout = RolloutBatch.from_groups(groups)
    ratios = torch.zeros(rollout.mask.shape)
    for row, (_, values) in enumerate(answer for answers in ANSWERS for answer in answers):
        ratios[row, : len(values)] = torch.tensor(values)
    reference = torch.full_like(ratios, -3.0) * rollout.mask
    prm = PrmBatch(rollout=rollout, reference_logprobs=reference, prm_logprobs=reference + ratios)
    return ProcessInputs(groups=tuple(groups), rollout=rollout, prm=prm, beta=BETA), BETA * ratios


def no_steps(prompt: Prompt, response: Response) -> None:
    return None


def test_recent_step_auc_weighs_batches_by_their_pairs() -> None:
    def of(auc: float, num_pairs: int) -> Evidence:
        return Evidence(loss=0.0, accuracy=0.0, auc=0.5, gate=0.0, step_auc=auc, num_step_pairs=num_pairs)

    history = [of(1.0, 10), of(math.nan, 0), of(0.6, 30)]
    assert recent_step_auc(history) == pytest.approx((10 + 18) / 40)
    assert math.isnan(recent_step_auc(history[1:2]))


def test_evidence_by_hand() -> None:
    inputs, rewards = hand_made()
    evidence = measure_evidence(inputs, rewards, PrmSection(beta=BETA), no_steps)
    # Sequence logits 1.5, -1.0, 0.5, 0.25 with labels 1, 0, 0, 1.
    losses = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(-1.0)), math.log1p(math.exp(0.5))]
    losses.append(math.log1p(math.exp(-0.25)))
    assert evidence.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert evidence.accuracy == 0.75  # the third is taken for right
    assert evidence.auc == 0.5  # the first group's pair is in order, the second's is not
    assert evidence.gate == 0.0
    assert math.isnan(evidence.step_auc)
    assert evidence.metrics().keys() == {"prm/fresh_loss", "prm/fresh_accuracy", "prm/fresh_auc", "prm/step_auc"}


def test_mean_aggregation_reorders() -> None:
    inputs, rewards = hand_made()
    section = PrmSection(beta=BETA, aggregation="mean")
    evidence = measure_evidence(inputs, rewards, section, no_steps)
    logits = [0.75, -1 / 3, 0.5, 0.125]
    signs = [1, -1, -1, 1]
    expected = sum(math.log1p(math.exp(-s * x)) for s, x in zip(signs, logits, strict=True)) / 4
    assert evidence.loss == pytest.approx(expected, rel=1e-6)


def test_step_auc_by_hand() -> None:
    inputs, rewards = hand_made()
    steps = {
        "00": (StepSpan(start=0, stop=1, correct=True), StepSpan(start=1, stop=2, correct=True)),
        "01": (StepSpan(start=0, stop=1, correct=True), StepSpan(start=1, stop=3, correct=False)),
        "11": (StepSpan(start=0, stop=2, correct=False),),
    }
    evidence = measure_evidence(
        inputs, rewards, PrmSection(beta=BETA), lambda prompt, response: steps.get(response.text)
    )
    # Step means 1.0, 0.5, 0.5 (right) and -0.75, 0.125 (wrong): all six pairs are in order.
    assert evidence.step_auc == 1.0
    steps["10"] = (StepSpan(start=0, stop=1, correct=False),)  # 0.5 wrong: one pair in order, two ties
    evidence = measure_evidence(
        inputs, rewards, PrmSection(beta=BETA), lambda prompt, response: steps.get(response.text)
    )
    assert evidence.step_auc == pytest.approx((6 + 1 + 0.5 + 0.5) / 9)


def test_one_kind_of_outcome_earns_nothing() -> None:
    inputs, rewards = hand_made()
    right = tuple(Group(prompt=g.prompt, responses=g.responses, rewards=(1.0, 1.0)) for g in inputs.groups)
    rollout = RolloutBatch.from_groups(right)
    evidence = measure_evidence(
        replace(inputs, groups=right, rollout=rollout), rewards, PrmSection(beta=BETA), no_steps
    )
    assert math.isnan(evidence.auc) and evidence.gate == 0.0 and evidence.accuracy == 0.75
