"""Words around a formula in a box: which say nothing, which are a unit, and which change what the answer says."""

from __future__ import annotations

import re

_BOX = r"\\(?:text|textrm|textbf|textit|mathrm|mbox)\s*\{"
_ANSWER_IS = r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\b\s*:?|:|=)\s*"
_LEAD_IN = re.compile(rf"(?:{_BOX}\s*{_ANSWER_IS}\}}|{_ANSWER_IS})\s*(?=\S)", re.IGNORECASE)
_SENTENCE = re.compile(
    rf"(?:{_BOX}\s*)?(?P<words>[A-Za-z][A-Za-z' ]*?)\s(?:is|are|equals|(?:is|are)\s+equal\s+to)\b\s*:?\s*\}}?\s*(?=\S)"
)
_LABEL = re.compile(r"(?P<words>[^\W\d_]{2,}(?: [^\W\d_]+)*)\s*[:：]\s*(?=\S)")
_HEDGE_WORDS = r"approximately|approx\.?|about|roughly|around|circa"
_HEDGE = re.compile(rf"(?:{_BOX}\s*)?(?:{_HEDGE_WORDS})\s*\}}?\s*(?=[\d.\\+$-])", re.IGNORECASE)
_ROUNDED = re.compile(
    rf"[\s,]*(?:{_BOX}\s*)?\(?\s*(?:{_BOX}\s*)?(?:{_HEDGE_WORDS}|\\approx)\s*\}}?\s*(?P<number>-?\d[\d.,]*)"
    rf"\s*(?:{_BOX}\s*\)?\s*\}}|\)\s*\}}?|\}})?\s*$",
    re.IGNORECASE,
)
_QUALIFIER = re.compile(
    rf"(?:,|\s|\(|{_BOX})+(?P<words>(?:for|where|with)\b.*|[a-zA-Z]\s*\}}?\s*\\in\s*\\mathbb\s*\{{?\s*[ZNRQC]\s*\}}?\s*\)?)$",
    re.DOTALL,
)
_QUALIFYING = """
for where with any all every each some an a the is are being be real complex integer integers arbitrary constant
constants number numbers and of value values parameter parameters coefficient in
"""
_QUALIFIER_WORDS = frozenset(_QUALIFYING.split())
_TOKEN = re.compile(r"\\mathbb\s*\{?\s*[A-Z]\s*\}?|\\in\b|\\text\w*\s*\{|[A-Za-z]+|\S")

_CHANGING = """
million millions billion billions trillion trillions thousand thousands hundred hundreds dozen dozens score scores
gross lakh crore myriad tens ten pair pairs couple half halves third thirds quarter quarters fourth fourths fifth
fifths sixth tenth tenths hundredth hundredths thousandth thousandths double doubled twice thrice triple tripled
halved times time's minus plus over divided by multiplied multiply squared cubed root power raised to not no never
none nor or but and is isn't was are aren't be maybe perhaps possibly probably than more less fewer greater least
most about approximately nearly almost except instead if unless otherwise mod modulo modulus factorial choose
negative positive remainder equals equal it does doesn't wrong incorrect false true short off increased decreased
added subtracted another different rather actually zero one two three four five six seven eight nine eleven twelve
twenty thirty forty fifty sixty seventy eighty ninety point base inclusive exclusive reciprocal inverse opposite
"""
_NOT_UNITS = frozenset(_CHANGING.split())
_NOT_UNITS_ELSEWHERE = re.compile("[万亿億千百十倍半分之多余餘几幾负負减減加乘除或和不非約约百]")
_SHORT = """
m s g h A C F J L N V W l t Pa Hz kg mg cm mm km nm in ft yd mi lb oz hr kW kN kJ kV mL ml dm ms ns pm am cl dl cd eV
m/s km/h ft/s mi/h pt qt cc
"""
_SHORT_UNITS = frozenset(_SHORT.split())
_UNIT_WORD = re.compile(r"(?:[^\W\d_]|[.'µ-])+(?:\^\{?-?\d\}?|[²³])?(?:[/*·](?:[^\W\d_])+(?:\^\{?-?\d\}?|[²³])?)*")
_SMALL_WORDS = ("a", "of", "sq", "cu")
"""Of longer names of units."""
MAX_UNIT_WORDS = 4


def without_prose(text: str) -> str:
    """An answer without words that only introduce it or say what its letters stand for.

    `The area is 5`, `\\text{The answer is } 5`, `about 5`, `x + c for any real c`, `5 (about 5.01)`: what is left is
    `5`, `x + c` and `5 \\approx 5.01`. Words that deny, correct or add something stay, and make the answer unreadable.
    """
    if (match := _LEAD_IN.match(text)) or (
        (match := _SENTENCE.match(text) or _LABEL.match(text)) and not _changes(match.group("words"))
    ):
        text = text[match.end() :]
    if match := _HEDGE.match(text):
        text = text[match.end() :]
    if (match := _QUALIFIER.search(text)) and match.start() > 0 and _only_qualifies(match.group("words")):
        text = text[: match.start()]
    if (match := _ROUNDED.search(text)) and match.start() > 0:
        text = f"{text[: match.start()]}\\approx {match.group('number').rstrip('.,')}"
    return text


def _changes(words: str) -> bool:
    return any(word in _NOT_UNITS for word in words.lower().split())


def _only_qualifies(words: str) -> bool:
    for token in _TOKEN.findall(words):
        plain = token.lower() in _QUALIFIER_WORDS or (len(token) == 1 and (token.isalpha() or token in "{}(),.$_"))
        if not plain and not token.startswith(("\\mathbb", "\\in", "\\text")):
            return False
    return True


def is_unit(words: str) -> bool:
    """Whether words behind a number say what is counted or measured, and nothing about how much."""
    parts = words.split()
    if not 0 < len(parts) <= MAX_UNIT_WORDS:
        return False
    for part in parts:
        if part.lower().strip(".'") in _NOT_UNITS or _NOT_UNITS_ELSEWHERE.search(part):
            return False
        # One or two letters are rather variables.
        base = part.partition("^")[0]
        short = part.isascii() and len(base) < 3 and base not in _SHORT_UNITS
        if (short or not _UNIT_WORD.fullmatch(part)) and (len(parts) == 1 or part not in _SMALL_WORDS):
            return False
    return True
