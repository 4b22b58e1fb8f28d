"""Selects math problems that can be asked without a picture, a proof or a list of choices.

The rules are those of PRIME's first two cleaning stages (PRIME-RL/PRIME ``data_preprocessing``) as far as they need no
model; where PRIME has a language model reword multiple-choice questions, choices are cut off by rule here, and what the
rule does not understand is dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIGURE = re.compile(
    r"(?<!significant )\b(?:figures?|diagrams?)\b(?! out\b)|!\[[^\]]*\]\(|\\includegraphics|<img\b", re.IGNORECASE
)
_PROOF = re.compile(r"\b(?:prove|proof|show that)\b", re.IGNORECASE)
_BLANK = re.compile(r"\\underline\s*\{")
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
# A question with one of these asks about its choices.
_ABOUT_CHOICES = re.compile(
    r"\b(?:following|statements?|options?|choices?|which (?:of|one)|closest|nearest|(?:in)?correct|false|letters?)\b",
    re.IGNORECASE,
)
_NO_VALUE = re.compile(
    r"\b(?:none|neither|both|all of|any of|not (?:enough|uniquely)|cannot|can't|undetermined|impossible)\b",
    re.IGNORECASE,
)
_LETTERS = "ABCDEFGH"
_MIN_CHOICES = 3
_WRAPPER = r"(?:\\(?:textbf|mathbf|mathrm|text|rm|bf)\s*\{?\s*)?"
_STYLES = tuple(
    [re.compile(_WRAPPER + form.format(letter)) for letter in _LETTERS]
    for form in (r"\(\s*{0}\s*\)(?:\s*\\?\s*\}})?", r"(?<![A-Za-z\\]){0}\s*(?:\}}\s*)?[.:](?:\s*\\?\s*\}})?")
)
_SPACING = re.compile(r"\\(?:qquad|quad|indent|[,;:! ])|~|&|\\\\")
_LETTER_ANSWER = re.compile(rf"^\s*\$?\s*{_WRAPPER}\(?\s*([{_LETTERS}])\s*\)?\s*[.}}]*\s*\$?\s*$")
_OPENING = re.compile(r"(?:\\\[|\\\(|\\(?:textbf|mathbf|mathrm|text|rm|bf)\s*\{|\(\s*(?:\\q?quad)?\s*\)|\\\\|[\s~&])+$")
_UNFINISHED = re.compile(r"\\(?:textbf|mathbf|mathrm|text)\s*\{\s*$")
_INSTRUCTION = re.compile(r"\b(?:letter|option|choice|answer)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """A multiple-choice question without its choices."""

    text: str
    answer: str


def reason_to_drop(problem: str) -> str | None:
    """Why a problem cannot be asked or checked: ``figure``, ``proof``, ``fill_in_blank``; None: it can."""
    for reason, pattern in (("figure", _FIGURE), ("proof", _PROOF), ("fill_in_blank", _BLANK)):
        if pattern.search(problem):
            return reason
    return None


def open_choices(problem: str, answer: str) -> OpenQuestion | str | None:
    """Turns a multiple-choice question into an open one.

    Args:
        problem: with labelled choices (A), (B), (C) or A., B., C. at its end.
        answer: a letter, or the value of a choice.

    Returns:
        None: not multiple choice. Text: why it cannot be opened, ``choice_needed`` (asks about its choices) or
        ``choice_unclear`` (choices or answer are not understood).
    """
    found = _split_choices(problem)
    if found is None:
        return None
    text, choices, rest = found
    if _ABOUT_CHOICES.search(text) or any(_NO_VALUE.search(choice) for choice in choices):
        return "choice_needed"
    letter = _LETTER_ANSWER.match(answer)
    if letter is not None:
        place = _LETTERS.index(letter.group(1))
        value = choices[place] if place < len(choices) else ""
    else:
        value = answer.strip() if _plain(answer) in {_plain(choice) for choice in choices} else ""
    if rest and not _INSTRUCTION.search(rest):
        return "choice_unclear"
    if not value or not text or text.count("$") % 2 or not _balanced(value):
        return "choice_unclear"
    return OpenQuestion(text, value)


def _split_choices(problem: str) -> tuple[str, list[str], str] | None:
    """The question, its choices and what comes after them; None where there are fewer than three in order."""
    drawn = [match.span() for match in _DRAWING.finditer(problem)]
    for style in _STYLES:
        labels: list[re.Match[str]] = []
        for pattern in style:
            start = labels[-1].end() if labels else 0
            places = [m for m in pattern.finditer(problem, start) if not any(a <= m.start() < b for a, b in drawn)]
            if not places:
                break
            # Letters may name points of the question before they label its choices.
            labels.append(places[0] if labels else places[-1])
        if len(labels) >= _MIN_CHOICES:
            ends = [*(label.start() for label in labels[1:]), len(problem)]
            choices = [problem[label.end() : end].strip() for label, end in zip(labels, ends, strict=True)]
            choices[-1], _, rest = choices[-1].partition("\n\n")
            return _before_choices(problem[: labels[0].start()]), [_clean(choice) for choice in choices], rest.strip()
    return None


def _before_choices(text: str) -> str:
    """The question without the blank for the letter and without what typesets the first choice."""
    while True:
        shorter = _OPENING.sub("", text)
        if shorter.endswith("$") and shorter.count("$") % 2:
            shorter = shorter[:-1]
        shorter = re.sub(r"\$\s*\(\s*\\q?quad\s*\)\s*\$$", "", shorter)
        if shorter == text:
            return text.strip()
        text = shorter


def _clean(choice: str) -> str:
    """The value of a choice without the typesetting around it."""
    text = _UNFINISHED.sub("", _SPACING.sub(" ", choice).replace("$", " ").strip()).strip()
    text = re.sub(r"\\\]$", "", text).strip()
    while text.startswith("}"):
        text = text[1:].strip()
    while text.endswith("}") and text.count("}") > text.count("{"):
        text = text[:-1].strip()
    return text.rstrip(".,;").strip()


def _plain(value: str) -> str:
    """Normalises an answer for comparison with choices: no spacing, no thousands separators, one kind of fraction."""
    text = _SPACING.sub("", value).replace("$", "").replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d{3})", "", text)
    return re.sub(r"\s+|[.]$", "", text)


def _balanced(text: str) -> bool:
    return all(text.count(opening) == text.count(closing) for opening, closing in ("{}", "()", "[]"))
