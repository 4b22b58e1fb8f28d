"""The weakest-link loss and its blame against products over plain floats, and what makes them useful."""

import math

import pytest
import slow_reference as slow
import torch

from megatron_prime.algorithm.weakest_link import log_all_right, step_blame, step_evidence, weakest_link_loss


def random_steps(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (8,), generator=generator)
    present = torch.arange(5) < lengths[:, None]
    logits = scale * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return torch.where(present, logits, 33.0).requires_grad_(), present


def products(logits: torch.Tensor, present: torch.Tensor) -> list[float]:
    return [math.prod(slow.sigmoid(s) for s in row) for row in slow.to_rows(logits.detach(), present)]


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_the_cross_entropy_of_the_product(seed):
    logits, present = random_steps(seed)
    labels = (torch.arange(8) % 2).to(torch.float64)
    expected = 0.0
    for p, y in zip(products(logits, present), labels.tolist(), strict=True):
        expected -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert weakest_link_loss(logits, present, labels, num_responses=8).item() == pytest.approx(expected / 8)
    assert log_all_right(logits, present).tolist() == pytest.approx([math.log(p) for p in products(logits, present)])


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_the_docstring(seed):
    logits, present = random_steps(seed)
    labels = (torch.arange(8) % 2).to(torch.float64)
    weakest_link_loss(logits, present, labels, num_responses=1).backward()
    assert logits.grad is not None
    for i, p in enumerate(products(logits, present)):
        for k in range(5):
            rest = 1 - slow.sigmoid(logits[i, k].item())
            expected = -rest if labels[i] == 1 else rest * p / (1 - p)
            assert logits.grad[i, k].item() == pytest.approx(expected if present[i, k] else 0.0)


def test_parts_add_up_to_the_mini_batch():
    logits, present = random_steps(7)
    labels = (torch.arange(8) % 2).to(torch.float64)
    whole = weakest_link_loss(logits, present, labels, num_responses=8)
    parts = [weakest_link_loss(logits[s], present[s], labels[s], num_responses=8) for s in (slice(0, 3), slice(3, 8))]
    assert sum(parts).item() == pytest.approx(whole.item())


@pytest.mark.parametrize("seed", range(5))
def test_blame_is_the_posterior_by_enumeration(seed):
    logits, present = random_steps(seed, scale=1.5)
    blame = step_blame(logits, present)
    for i, row in enumerate(slow.to_rows(logits.detach(), present)):
        right = [slow.sigmoid(s) for s in row]
        wrong_answer, wrong_step = 0.0, [0.0] * len(row)
        for case in range(1, 2 ** len(row)):  # every set of wrong steps but the empty one
            chosen = [bool(case >> k & 1) for k in range(len(row))]
            weight = math.prod(1 - p if c else p for p, c in zip(right, chosen, strict=True))
            wrong_answer += weight
            wrong_step = [total + weight * c for total, c in zip(wrong_step, chosen, strict=True)]
        assert blame[i, : len(row)].tolist() == pytest.approx([total / wrong_answer for total in wrong_step])
        assert not blame[i, len(row) :].any()


def test_a_certain_answer_that_is_wrong_stays_finite():
    logits = torch.full((1, 3), 60.0, requires_grad=True)
    present = torch.ones(1, 3, dtype=torch.bool)
    loss = weakest_link_loss(logits, present, torch.zeros(1), num_responses=1)
    loss.backward()
    assert math.isfinite(loss.item()) and logits.grad is not None and torch.isfinite(logits.grad).all()
    blame = step_blame(torch.tensor([[60.0, 60.0], [-60.0, 60.0]]), torch.ones(2, 2, dtype=torch.bool))
    assert torch.isfinite(blame).all() and blame[1].tolist() == pytest.approx([1.0, 0.0])


def test_facts_shared_by_answers_are_told_apart_from_outcomes_alone():
    # Three facts, answers of two: every right one is certified, the wrong one gets all the blame.
    facts = torch.tensor([[0, 1], [0, 2], [1, 2]])
    labels = torch.tensor([1.0, 0.0, 0.0])
    scores = torch.full((3,), 2.0, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    present = torch.ones(3, 2, dtype=torch.bool)
    for _ in range(50):
        optimizer.zero_grad()
        weakest_link_loss(scores[facts], present, labels, num_responses=3).backward()
        optimizer.step()
    assert scores[0] > 2.0 and scores[1] > 2.0 and scores[2] < -1.0
    assert (step_blame(scores[facts], present)[1:, 1] > 0.95).all()


def test_evidence_is_nothing_without_knowledge_and_certain_at_the_ends():
    present = torch.tensor([[True, True, True], [True, False, False]])
    silent = torch.full((2, 3), 2.5)
    assert not step_evidence(silent, present, bias=2.5).any()
    knows = torch.tensor([[-40.0, 40.0, 2.5], [-40.0, 0.0, 0.0]])
    evidence = step_evidence(knows, present, bias=2.5)
    assert evidence[0, :2].tolist() == pytest.approx([-1.0, 1.0])
    # The failure is explained, so the step of which nothing is known is better than before.
    assert 0.0 < evidence[0, 2] < 1.0
    assert not evidence[1].any()


@pytest.mark.parametrize("seed", range(5))
def test_evidence_agrees_with_a_loop(seed):
    logits, present = random_steps(seed)
    evidence = step_evidence(logits, present, bias=1.0)
    for i, row in enumerate(slow.to_rows(logits.detach(), present)):
        wrong = 1 - math.prod(slow.sigmoid(s) for s in row)
        before = (1 - slow.sigmoid(1.0)) / (1 - slow.sigmoid(1.0) ** len(row))
        for k, s in enumerate(row):
            blame = (1 - slow.sigmoid(s)) / wrong
            if len(row) == 1:
                expected = 0.0
            elif blame < before:
                expected = 1 - blame / before
            else:
                expected = -(blame - before) / (1 - before)
            assert evidence[i, k].item() == pytest.approx(expected, abs=1e-9)
