"""Duplicates and contamination against exact sets of word runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_prime.data.prepare.contamination import Contamination
from megatron_prime.data.prepare.similarity import NearDuplicates, fingerprint, ngrams, words

QUESTIONS = [
    json.loads(line)["question"]
    for line in (Path(__file__).resolve().parents[3] / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()
]


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(max(1, len(found) - length + 1))}


def jaccard(one: str, other: str) -> float:
    a, b = runs(one, 3), runs(other, 3)
    return len(a & b) / len(a | b)


def changed(text: str, share: float, seed: int) -> str:
    """The text with some words replaced."""
    chance = random.Random(seed)
    return " ".join(f"word{chance.randrange(10**6)}" if chance.random() < share else word for word in text.split())


def test_fingerprints_see_signs_and_no_typesetting() -> None:
    assert fingerprint("What is $x + y$?") == fingerprint("what is x+y ?") == fingerprint("What is ｘ+y?\n")
    assert len({fingerprint(text) for text in ("x+y", "x-y", "x+1", "x", "")}) == 5


def test_runs_of_words_are_counted_once() -> None:
    for text in (*QUESTIONS, "", "one", "one two three one two three one two three"):
        for length in (3, 8):
            found = ngrams(words(text), length)
            assert len(found) == len(runs(text, length)) and (np.diff(found.astype(object)) > 0).all()


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_what_is_near_is_found_and_nothing_else(threshold: float) -> None:
    pairs = [(q, changed(q, share, seed)) for q in QUESTIONS for share in (0.0, 0.02, 0.05, 0.1) for seed in range(5)]
    missed = num_near = 0
    for one, other in pairs:
        known = NearDuplicates(threshold)
        assert known.add(one) is None
        near = jaccard(one, other) >= threshold
        found = known.add(other) == 0
        assert near or not found
        num_near += near
        missed += near and not found
    # At 0.6 a pair at the threshold is missed with probability 0.37, at 0.8 with 0.002.
    assert num_near > 100 and missed <= (0.15 if threshold == 0.6 else 0.01) * num_near


def test_many_texts_in_one_memory() -> None:
    known = NearDuplicates(0.8)
    assert [known.add(q) for q in QUESTIONS] == [None] * len(QUESTIONS)
    assert [known.add(q.upper()) for q in QUESTIONS] == list(range(len(QUESTIONS)))
    assert known.add("something quite different") is None
    assert known.add("something quite different!") == len(QUESTIONS)


def test_equal_words_with_another_key_are_another_text() -> None:
    known = NearDuplicates(0.8)
    assert known.add(QUESTIONS[0], "18") is None and known.add(QUESTIONS[0], "3") is None
    assert known.add(QUESTIONS[0], "3") == 1 and known.add(QUESTIONS[0], "18") == 0
    assert NearDuplicates(1.1).add("a b c") is None


def test_contamination_is_half_of_the_problem() -> None:
    problem = QUESTIONS[0]
    found = words(problem)
    known = Contamination([("gsm8k/0", problem), ("gsm8k/1", QUESTIONS[1])])
    assert len(known) == 2 and known.find(f"Read this first. {problem} And then answer.") == "gsm8k/0"
    num_runs = len(found) - 7
    half = (num_runs + 1) // 2
    assert known.find(" ".join(found[: half + 7])) == "gsm8k/0"
    assert known.find(" ".join(found[: half + 6])) is None
    assert known.find(QUESTIONS[2]) is None and known.find("") is None


def test_a_common_ending_is_no_contamination() -> None:
    ending = " Let this be m/n, where m and n are relatively prime positive integers. Find m + n."
    known = Contamination([("aime24/0", QUESTIONS[0] + ending)])
    assert known.find(QUESTIONS[1] + ending) is None and known.find(QUESTIONS[0]) == "aime24/0"


def test_a_short_problem_is_known_by_all_of_its_words() -> None:
    known = Contamination([("math500/0", "Compute $\\sin 45^\\circ$.")])
    assert known.find("compute \\sin 45^{\\circ}") == "math500/0"
    assert known.find("Compute $\\sin 45^\\circ + 1$.") is None
