"""Finds the final answer of a response and compares it with the truth, as far as exact rules go.

What `decide` leaves open (about one answer in fifty) is for the symbolic grader in `pool`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_prime.verify.math.normalize import Answer, clean_unicode, exact_value, normalize

MAX_TAIL_CHARS = 20_000
"""The answer is looked for in this many last characters of a response."""
MAX_ANSWER_CHARS = 1_000
"""Longer box contents are refused."""

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{?)|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s$\\{}]+")
_WHOLE_BOX = re.compile(r"\s*\\(?:boxed|fbox)\s*\{")
_GAP = r"(?:[\s$.]|\\(?:quad|qquad|[,;()\[\]]))*"
_BETWEEN_BOXES = re.compile(rf"{_GAP}(?:,{_GAP})?(?:,|and|\\text\{{\s*,?\s*and\s*\}}){_GAP}")
_PI_AFTER_NUMBER = re.compile(r"(?<=[\d}])\\pi")
_ASSIGNMENT = re.compile(r"([a-zA-Z])=([^=<>]+)")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")


@dataclass(frozen=True, slots=True)
class Extraction:
    """The final answer of a response, or why there is none."""

    status: Literal["found", "no_answer", "malformed", "too_long"]
    answer: str = ""


def extract_answer(text: str) -> Extraction:
    """The content of the last complete `\\boxed{..}` (also `\\fbox{..}` and `\\boxed 5`) of a response.

    Different boxes with a comma or "and" between them are one answer of several parts. ("or" says the same again.)

    Args:
        text: the response; only its last `MAX_TAIL_CHARS` characters are read.

    Returns:
        `no_answer` without a box, `malformed` where the only boxes are empty or never closed,
        `too_long` where the last one holds more than `MAX_ANSWER_CHARS` characters.
    """
    tail = text[-MAX_TAIL_CHARS:]
    open_braces: list[tuple[int, int] | None] = []
    last: str | None = None
    last_end = 0
    seen = False

    def complete(content: str, begin: int, end: int) -> None:
        nonlocal last, last_end
        is_part = last is not None and content != last and begin > last_end
        follows = is_part and _BETWEEN_BOXES.fullmatch(tail, last_end, begin)
        last, last_end = f"{last}, {content}" if follows else content, end

    for token in _TOKEN.finditer(tail):
        word = token.group()
        if word == "{":
            open_braces.append(None)
        elif word == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                content, begin = start
                complete(tail[content : token.start()], begin, token.end())
        elif word.startswith((r"\boxed", r"\fbox")):
            seen = True
            if token.group(1):
                open_braces.append((token.end(), token.start()))
            elif bare := _BARE.match(tail, token.end()):
                complete(bare.group().rstrip(".,;:!?"), token.start(), bare.end())
    if last is None:
        return Extraction("malformed" if seen else "no_answer")
    while (box := _WHOLE_BOX.match(last)) and last.rstrip().endswith("}"):
        last = last[box.end() : last.rstrip().rindex("}")]
    if len(last) > MAX_ANSWER_CHARS:
        return Extraction("too_long", last[:MAX_ANSWER_CHARS])
    answer = clean_unicode(last).strip()
    return Extraction("found" if normalize(answer).text else "malformed", answer)


def decide(gold: str, answer: str, tolerance: Fraction | None = None) -> bool | None:
    """Compares two answers by exact rules.

    Args:
        gold: ground truth.
        answer: what `extract_answer` found.
        tolerance: by how much a number may be off, where its problem says so.

    Returns:
        Whether they are equal, or None where exact rules cannot tell.
    """
    truth, given = normalize(gold), normalize(answer)
    if tolerance is not None and truth.value is not None and given.value is not None:
        return abs(truth.value - given.value) <= tolerance and _units_agree(truth, given)
    for rule in (_equal_angles, _equal_values, _equal_words, _equal_assignments, _equal_bases, _equal_collections):
        verdict = rule(truth, given)
        if verdict is not None:
            return verdict
    if truth.text and truth.text == given.text and _units_agree(truth, given):
        return True
    return None


def _units_agree(truth: Answer, given: Answer) -> bool:
    # A unit that one side leaves out is taken as implied by the question; two different ones never agree.
    return truth.unit == given.unit or not truth.unit or not given.unit


def _equal_values(truth: Answer, given: Answer) -> bool | None:
    if truth.value is None or given.value is None:
        letters = given.text.isalpha() or truth.text.isalpha()
        return False if letters and (truth.value is not None or given.value is not None) else None
    return truth.value == given.value and _units_agree(truth, given)


def _equal_angles(truth: Answer, given: Answer) -> bool | None:
    """Degrees on one side, a multiple of pi on the other."""
    degrees, radians = (truth, given) if truth.unit == "°" else (given, truth)
    if degrees.unit != "°" or radians.unit or degrees.value is None or r"\pi" not in radians.text:
        return None
    multiple = exact_value(_PI_AFTER_NUMBER.sub("", radians.text).replace(r"\pi", "1"))
    return None if multiple is None else degrees.value == 180 * multiple


def _equal_words(truth: Answer, given: Answer) -> bool | None:
    if not truth.is_word and not given.is_word:
        return None
    if truth.text.strip("()").casefold() == given.text.strip("()").casefold():
        return True
    return False if truth.is_word and given.is_word else None


def _equal_assignments(truth: Answer, given: Answer) -> bool | None:
    sides = [_ASSIGNMENT.fullmatch(side.text) for side in (truth, given)]
    if not any(sides):
        return None
    names = {match.group(1) for match in sides if match}
    right, left = (match.group(2) if match else side.text for match, side in zip(sides, (truth, given), strict=True))
    if len(names) == 1:
        return decide(right, left)
    both_numbers = normalize(right).value is not None and normalize(left).value is not None
    return False if both_numbers else None


def _equal_bases(truth: Answer, given: Answer) -> bool | None:
    based_truth, based_given = _BASED.fullmatch(truth.text), _BASED.fullmatch(given.text)
    if based_truth and based_given:
        return based_truth.groups() == based_given.groups()
    if based_given and truth.value is not None and based_given.group(1).isdigit():
        return False
    return None


@dataclass(frozen=True, slots=True)
class _Collection:
    brackets: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.brackets[:1] in ("(", "[")


def _split_collection(answer: Answer) -> _Collection | None:
    """Reads `(a,b)`, `[a,b)`, `\\{a,b\\}` or `a,b`; None for anything else."""
    if answer.value is not None or "," not in answer.text:
        return None
    text, brackets = answer.text, ""
    inner = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", text)
    if inner and (items := _split_top_level(inner.group(2))) and len(items) > 1:
        brackets = inner.group(1) + inner.group(3)
    else:
        items = _split_top_level(text)
    if items is None or len(items) < 2 or not all(items):
        return None
    return _Collection(brackets, tuple(items))


def _split_top_level(text: str) -> list[str] | None:
    """Splits at commas outside of brackets; None where brackets do not match up."""
    depth, start, items = 0, 0, []
    for position, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif char == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    return [*items, text[start:]] if depth == 0 else None


def _equal_collections(truth: Answer, given: Answer) -> bool | None:
    gold, found = _split_collection(truth), _split_collection(given)
    if gold is None or found is None:
        single, many = (truth, found) if found else (given, gold)
        numbers = many is not None and not many.brackets and all(normalize(i).value is not None for i in many.items)
        return False if numbers and single.value is not None else None
    if gold.brackets != found.brackets:
        return False if gold.ordered and found.ordered else None
    if not _units_agree(truth, given):
        return False
    if gold.ordered:
        if len(gold.items) != len(found.items):
            return False
        return _all_of([decide(a, b) for a, b in zip(gold.items, found.items, strict=True)])
    if len(gold.items) != len(found.items):
        return None
    return _match_unordered(gold.items, found.items)


def _all_of(verdicts: Sequence[bool | None]) -> bool | None:
    if any(verdict is False for verdict in verdicts):
        return False
    return True if all(verdicts) else None


def _match_unordered(gold: Sequence[str], found: Sequence[str]) -> bool | None:
    """Pairs the items off in any order; equality is transitive, so taking the first partner loses nothing."""
    if len(gold) > 50:
        return None
    left, undecided = list(found), False
    for item in gold:
        verdicts = [decide(item, other) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return None if undecided else False
    return None if undecided else True
