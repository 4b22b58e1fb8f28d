"""Finds the final answer of a response and compares it with the truth, as far as exact rules go.

What `decide` leaves open (about one answer in fifty) is for the symbolic grader in `pool`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
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
_BASED = re.compile(r"(-?[0-9A-Za-z]+)_\{?(\d+)\}?")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"[+-]?[\d.,]+")
_NAME = re.compile(r"[a-zA-Z](?:_\w+)?")
_LONG_DECIMAL = re.compile(r"[+-]?\d*\.(\d{8,60})")
_IS_DIVISION = re.compile(r"/|\\frac")
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+)")
_CHOICE = re.compile(r"\(?([A-Ha-h])\)?")
_CHOSEN = re.compile(r"(?:\\(?:text|textbf|mathrm)\s*\{\s*)?\(([A-H])\)(?!.*(?:\([A-H]\)|,|\bor\b|\band\b))", re.DOTALL)
_WORD = re.compile(r"(?=[^aeiouyAEIOUY]*[aeiouyAEIOUY])[A-Za-z]{4,}")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|in|ne|approx|equiv)(?![a-zA-Z])")


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
        tolerance: by how much a number may be off, where its problem says so; also in lists.

    Returns:
        Whether they are equal, or None where exact rules cannot tell. Only final forms are found equal: numbers as one
        writes them, words, lists of these, and the spelling of the truth itself.
    """
    truth, given = normalize(gold), normalize(answer)
    if truth.text and truth.text == given.text and truth.is_word == given.is_word and truth.unit == given.unit:
        return True
    if tolerance is not None and truth.value is not None and given.value is not None:
        return abs(truth.value - given.value) <= tolerance and _units_agree(truth, given)
    for rule in (_equal_angles, _equal_values, _equal_words, _equal_bases):
        verdict = rule(truth, given)
        if verdict is not None:
            return verdict
    verdict = _equal_assignments(truth, given, tolerance)
    if verdict is None:
        verdict = _equal_collections(truth, given, tolerance)
    same_text = truth.text and truth.text == given.text and _units_agree(truth, given)
    return True if verdict is None and same_text else verdict


@lru_cache(maxsize=4096)
def truth_text(label: str) -> str:
    """The ground truth as it is compared: of a box its content, of labels such as `["7", "9"]` the list `7, 9`.

    Args:
        label: as it stands in a data set.
    """
    text = clean_unicode(label).strip()
    if text.startswith(('["', "['")):
        try:
            items = json.loads(text) if text.startswith('["') else ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            items = None
        if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
            text = ", ".join(item.strip().strip("$") for item in items)
    if "\\boxed" in text or "\\fbox" in text:
        found = extract_answer(text)
        return found.answer if found.status == "found" else text
    return text


def restates(question: str, gold: str, answer: str) -> bool:
    """Whether an answer is a formula of the question, and not the one that the truth is.

    It may have the truth's value, as `3/20` has that of 0.15, but then it is what was to be worked on.

    Args:
        question: its formulas stand between dollar signs or `\\(..\\)`.
        gold: ground truth.
        answer: found equal to it.
    """
    truth, given = normalize(gold).text, normalize(answer).text
    if given == truth or truth.endswith(f"={given}") or _PLAIN_NUMBER.fullmatch(given):
        return False
    formulas = (next(filter(None, match.groups())) for match in _FORMULA.finditer(question[-MAX_TAIL_CHARS:]))
    return any(normalize(clean_unicode(formula).strip(" .,?;")).text == given for formula in formulas)


def _units_agree(truth: Answer, given: Answer) -> bool:
    # A unit that one side leaves out is taken as implied by the question; two different ones never agree.
    return truth.unit == given.unit or not truth.unit or not given.unit


def _equal_values(truth: Answer, given: Answer) -> bool | None:
    if truth.value is None or given.value is None:
        letters = given.text.isalpha() or truth.text.isalpha()
        if letters and (truth.value is not None or given.value is not None):
            return False
        return _is_decimal_comma(truth, given) or None
    if "%" in (truth.unit, given.unit) and truth.unit != given.unit:
        return _percent_agrees(truth, given)
    # A division that comes out even is still to be carried out.
    if truth.value.denominator == 1 and _IS_DIVISION.search(given.text) and not _IS_DIVISION.search(truth.text):
        return False
    return (truth.value == given.value or _is_cut_off(truth, given)) and _units_agree(truth, given)


def _is_cut_off(truth: Answer, given: Answer) -> bool:
    """Whether a truth of eight decimal digits or more is a fraction, cut off or rounded."""
    digits = _LONG_DECIMAL.fullmatch(truth.text)
    if digits is None or truth.value is None or given.value is None or not _IS_DIVISION.search(given.text):
        return False
    return abs(truth.value - given.value) < Fraction(1, 10 ** len(digits.group(1)))


def _percent_agrees(truth: Answer, given: Answer) -> bool:
    """A percent sign on one side: the question may have asked for percents, or for the share that they are."""
    if truth.value is None or given.value is None or (truth.unit and given.unit):
        return False
    if truth.unit == "%":
        return given.value in (truth.value, truth.value / 100)
    return truth.value == given.value / 100 or (truth.value == given.value and abs(truth.value) >= 1)


def _is_decimal_comma(truth: Answer, given: Answer) -> bool:
    """`0,5` for 1/2: nothing else that it could mean is a number that is not whole."""
    match = _DECIMAL_COMMA.fullmatch(given.text)
    if match is None or truth.value is None or truth.value.denominator == 1:
        return False
    return truth.value == Fraction(f"{match.group(1)}.{match.group(2)}") and _units_agree(truth, given)


def _equal_angles(truth: Answer, given: Answer) -> bool | None:
    """Degrees on one side, a multiple of pi on the other."""
    degrees, radians = (truth, given) if truth.unit == "°" else (given, truth)
    if degrees.unit != "°" or radians.unit or degrees.value is None or r"\pi" not in radians.text:
        return None
    multiple = exact_value(_PI_AFTER_NUMBER.sub("", radians.text).replace(r"\pi", "1"))
    return None if multiple is None else degrees.value == 180 * multiple


def _equal_words(truth: Answer, given: Answer) -> bool | None:
    words = [side.is_word or _WORD.fullmatch(side.text) is not None for side in (truth, given)]
    choices = [_CHOICE.fullmatch(side.text) for side in (truth, given)]
    if choices[0] and choices[1] and choices[0].group(1).isupper():
        return choices[0].group(1).upper() == choices[1].group(1).upper()
    if choices[0] and (match := _CHOSEN.match(given.body)):
        # A choice with what it says: "(C) 15".
        return choices[0].group(1) == match.group(1)
    if not any(words):
        return None
    if truth.text.strip("()").casefold() == given.text.strip("()").casefold():
        return True
    return False if all(words) else None


def _equal_assignments(truth: Answer, given: Answer, tolerance: Fraction | None) -> bool | None:
    sides = [_ASSIGNMENT.fullmatch(side.text) for side in (truth, given)]
    if not any(sides):
        return None
    if sides[1] and _CHOICE.fullmatch(truth.text):
        return False
    names = {match.group(1) for match in sides if match}
    right, left = (match.group(2) if match else side.text for match, side in zip(sides, (truth, given), strict=True))
    if any("," in side for side in (right, left)):
        return None
    if len(names) == 1:
        return decide(right, left, tolerance)
    both_numbers = normalize(right).value is not None and normalize(left).value is not None
    return False if both_numbers else None


def _equal_bases(truth: Answer, given: Answer) -> bool | None:
    """Numerals with their base: digits alone are a number of base ten."""
    based_truth, based_given = _BASED.fullmatch(truth.text), _BASED.fullmatch(given.text)
    if based_truth and based_given:
        return based_truth.groups() == based_given.groups()
    if based_truth:
        name, equals, digits = given.text.rpartition("=")
        named = equals and _NAME.fullmatch(name) and _BASED.fullmatch(digits)
        return bool(named) and digits == truth.text
    return False if based_given and truth.value is not None else None


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


def _equal_collections(truth: Answer, given: Answer, tolerance: Fraction | None) -> bool | None:
    gold, found = _split_collection(truth), _split_collection(given)
    if gold is None or found is None:
        single, many = (truth, found) if found else (given, gold)
        numbers = many is not None and not many.brackets and all(normalize(i).value is not None for i in many.items)
        return False if numbers and single.value is not None else None
    if any(_RELATION.search(side.text) for side in (truth, given)):
        return None
    if gold.brackets != found.brackets and (gold.ordered or found.ordered):
        # Of the two, only a set may be written without its brackets.
        return False
    if not _units_agree(truth, given):
        return False
    if gold.ordered:
        if len(gold.items) != len(found.items):
            return False
        return _all_of([decide(a, b, tolerance) for a, b in zip(gold.items, found.items, strict=True)])
    if len(gold.items) != len(found.items):
        return None
    return _match_unordered(gold.items, found.items, tolerance)


def _all_of(verdicts: Sequence[bool | None]) -> bool | None:
    if any(verdict is False for verdict in verdicts):
        return False
    return True if all(verdicts) else None


def _match_unordered(gold: Sequence[str], found: Sequence[str], tolerance: Fraction | None) -> bool | None:
    """Pairs the items off in any order; equality is transitive, so taking the first partner loses nothing."""
    if len(gold) > 50:
        return None
    left, undecided = list(found), False
    for item in gold:
        verdicts = [decide(item, other, tolerance) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return None if undecided else False
    return None if undecided else True
