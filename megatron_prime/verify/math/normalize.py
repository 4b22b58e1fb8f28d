"""One spelling for many: cleans the text of an answer and reads exact numbers from it.

Everything here is string work with bounded cost; nothing is ever evaluated.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_prime.verify.math.prose import is_unit, without_prose

MAX_EXACT_CHARS = 4000
"""Python refuses to read integers that are not much longer."""
MAX_EXPONENT = 1000
"""Powers of ten beyond this are not expanded: the number is left to the symbolic grader."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₋₊", "0123456789-+")
_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "°": r"^\circ ",
        "∞": r"\infty ",
        "π": r"\pi ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
    }
)

_SYNONYMS = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\leq": r"\le",
    r"\geq": r"\ge",
    r"\neq": r"\ne",
    r"\varnothing": r"\emptyset",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\degree": r"^\circ",
    r"\quad": " ",
    r"\qquad": " ",
    r"\left": "",
    r"\right": "",
    r"\displaystyle": "",
}
_COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)")
_SPACING = frozenset({r"\,", r"\;", r"\:", r"\!", r"\>", r"\ ", r"\$", r"\(", r"\)", r"\[", r"\]"})
_CONJUNCTION = re.compile(r",?\s*\\(?:text|mathrm|textrm|mbox)\{\s*(?:and|or)\s*\}|(?<=\d) +(?:and|or) +(?=[-\d])")
_STYLE = re.compile(r"\\(?:text|textnormal|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox)\s*\{([^{}]*)\}")
_DIGIT_GAP = re.compile(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3}(?!\d))")

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_GROUPED = re.compile(r"\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?")
_SCIENTIFIC = re.compile(rf"({_DECIMAL})(?:[eE]|(?:\\times|\\cdot)10\^)\{{?([+-]?\d{{1,5}})\}}?")
_RATIO = re.compile(rf"([+-]?{_DECIMAL})/([+-]?{_DECIMAL})|\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}")
_MIXED = re.compile(r"(\d+)(?: (\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\})")
_UNIT = re.compile(
    r"(.*\S)\s*\\(?:text|textnormal|textrm|textbf|mathrm|mbox)\s*\{\s*\(?\s*([^{}]*?)\s*\)?\s*\}(?:\^\{?\d\}?)?\)?",
    re.DOTALL,
)
_TRAILING = re.compile(r"(?:(?<!\.)[.,;]|\\| )+$")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{?(\d+)\}?|(\d*)\.(\d+)(?:\.\.\.+|\\l?dots|\\cdots)")
_COUNTED = re.compile(r"([+-]?[\d.,/: ]*[\d.])(\s*)\(?([^\W\d_][^\d()=<>\\^{}+*,_]*(?:\^\{?\d\}?)?)\)?")
_WORDS = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{2}|\\text|\\approx|\\mathbb")
_CONSTANT = re.compile(r"\\(?:mathrm|operatorname|rm)\s*\{\s*([eid])\s*\}")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z]{2})")
_PLAIN_COMMANDS = re.compile(r"\\(?:frac|sqrt|pi|cdot|times)(?![a-zA-Z])")
_LISTED = re.compile(r"\d\s*,(?:\s|~|\\[ ,;:]|\\q?quad(?![a-z]))+-?\d")
"""A comma with a space behind it is none of a number's."""

_UNIT_NAMES = {
    alias: name
    for name, aliases in {
        "%": "percent pct percents percentage",
        "°": "degree degrees deg",
        "m": "meter meters metre metres",
        "cm": "centimeter centimeters centimetre centimetres",
        "mm": "millimeter millimeters millimetre millimetres",
        "km": "kilometer kilometers kilometre kilometres",
        "in": "inch inches",
        "ft": "foot feet",
        "yd": "yard yards",
        "mi": "mile miles",
        "kg": "kilogram kilograms",
        "g": "gram grams",
        "s": "sec secs second seconds",
        "h": "hr hrs hour hours",
        "mph": "mi/h mi/hr",
        "dollar": "dollars usd",
        "cent": "cents",
        "lb": "pound pounds lbs",
        "min": "mins minute minutes",
        "pm": "p.m. p.m PM",
        "am": "a.m. a.m AM",
        "rpm": "rpm",
    }.items()
    for alias in aliases.split()
}
"""What a unit's names have in common. Powers and products stay as they are written."""


def clean_unicode(text: str) -> str:
    """Replaces look-alikes by their LaTeX or ASCII spelling and removes invisible characters.

    Args:
        text: any text.

    Returns:
        The text without control, zero-width and direction marks; super- and subscripts become `^{..}` and
        `_{..}`, vulgar fractions `\\frac{..}{..}`, full-width digits plain digits.
    """
    if text.isascii() and text.isprintable():
        return text
    text = re.sub(r"√\s*(\d+|[a-zA-Z]|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₋₊]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text.translate(_SYMBOLS))
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\s", " ", text)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in its normal spelling."""

    text: str
    """Without spacing commands, styles and units; equal texts mean equal answers."""
    value: Fraction | None
    """The exact number, where the text is one."""
    unit: str
    """What follows the number, lower case: `cm`, `%`, a degree sign; empty where there is none."""
    is_word: bool
    """Set as words (`\\text{even}`), not as a product of variables."""
    body: str
    """The formula as it was written, without units and words that say nothing."""


@lru_cache(maxsize=4096)
def normalize(latex: str) -> Answer:
    """Brings an answer (the content of a box, or a ground truth) to its normal spelling.

    Args:
        latex: LaTeX or plain text; cleaned by `clean_unicode`.

    Returns:
        Text, exact value, unit.
    """
    if "\\\\" in latex and "\\begin" not in latex:
        latex = _ESCAPED_TWICE.sub(r"\\", latex)
    listed = _LISTED.search(latex) is not None
    text = _DIGIT_GAP.sub("", latex)
    text = _COMMAND.sub(_replace_command, text).replace("$", "").replace("~", " ").strip()
    if _WORDS.search(text):
        text = _CONSTANT.sub(r"\1", without_prose(text))
    text = _CONJUNCTION.sub(",", text)
    is_word = bool(_STYLE.fullmatch(text)) and not any(c.isdigit() for c in text)
    body, unit = _split_unit(text)
    text = _STYLE.sub(r"\1", body)
    text = _canonical_braces(text)
    text = _TRAILING.sub("", _strip_spaces(text))
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1]
    value = None if listed and "," in text else exact_value(text)
    return Answer(text, value, unit, is_word, _TRAILING.sub("", body))


def _replace_command(match: re.Match[str]) -> str:
    command = match.group()
    if command in _SPACING:
        return " " if command == r"\ " else ""
    return _SYNONYMS.get(command, command)


def _split_unit(text: str) -> tuple[str, str]:
    """Cuts a percent or degree sign, or words behind a number, off."""
    bare = _TRAILING.sub("", text)
    for sign, name in ((r"\%", "%"), ("%", "%"), (r"^{\circ}", "°"), (r"^\circ", "°")):
        if (
            bare.endswith(sign)
            and bare != sign
            and not (name == "°" and "\\" in _PLAIN_COMMANDS.sub("", bare[: -len(sign)]))
        ):
            return bare[: -len(sign)], name
    if (match := _UNIT.fullmatch(bare)) and _is_unit(match.group(2)):
        # `12\text{cm}^2` and `12\text{cm}` are different: the power stays part of the unit.
        return match.group(1), _unit_name(bare[match.start(2) :].replace("}", "").strip("() "))
    inner = _STYLE.sub(r"\1", bare)
    if (match := _COUNTED.fullmatch(inner.strip())) and _is_unit(match.group(3), apart=bool(match.group(2))):
        return match.group(1), _unit_name(match.group(3))
    return text, ""


def _is_unit(words: str, *, apart: bool = True) -> bool:
    """Whether words are a unit; right behind a number (`5x`) only those that are known."""
    known = " ".join(words.split()) in _UNIT_NAMES or words.lower() in _UNIT_NAMES
    return known or (is_unit(words) and (apart or not words.isascii() or len(words) < 3))


def _unit_name(words: str) -> str:
    unit = " ".join(words.split())
    return _UNIT_NAMES.get(unit, _UNIT_NAMES.get(unit.lower(), unit.lower()))


def _canonical_braces(text: str) -> str:
    text = _BARE_ARGUMENT.sub(r"\\\1{\2}", text)
    text = _BARE_DENOMINATOR.sub(r"\1{\2}", text)
    return _BARE_INDEX.sub(r"\1\2", text)


def _strip_spaces(text: str) -> str:
    # Between digits a space means something: "3 1/2" is not "31/2".
    return _LOOSE_SPACES.sub("", " ".join(text.split()))


_BARE_ARGUMENT = re.compile(r"\\(frac|sqrt)\s*(?=[\da-zA-Z])(.)")
_BARE_DENOMINATOR = re.compile(r"(\\frac\{[^{}]*\})\s*([\da-zA-Z])")
_BARE_INDEX = re.compile(r"([_^])\{\s*(\w)\s*\}")
_LOOSE_SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")


def exact_value(text: str) -> Fraction | None:
    """Reads an integer, decimal, fraction, mixed number or power-of-ten notation exactly.

    Args:
        text: an answer in its normal spelling.

    Returns:
        The number, or None where the text is anything else (also a division by zero).
    """
    sign = 1
    body = text
    if len(text) > MAX_EXACT_CHARS:
        return None
    if body[:1] in ("+", "-"):
        sign, body = (-1 if body[0] == "-" else 1), body[1:].lstrip()
    if body[:1] in ("+", "-") or not any(c.isdigit() for c in body):
        return None
    if re.fullmatch(_DECIMAL, body):
        return sign * Fraction(body)
    if _GROUPED.fullmatch(body):
        return sign * Fraction(body.replace(",", "").replace(" ", ""))
    if match := _SCIENTIFIC.fullmatch(body):
        exponent = int(match.group(2))
        return sign * Fraction(match.group(1)) * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
    if match := _RATIO.fullmatch(body):
        top, bottom = (Fraction(part) for part in match.groups() if part is not None)
        return sign * top / bottom if bottom else None
    if match := _REPEATING.fullmatch(body):
        value = _repeating_value(match)
        return None if value is None else sign * value
    if match := _MIXED.fullmatch(body):
        whole, top, bottom = (int(part) for part in match.groups() if part is not None)
        return sign * (whole + Fraction(top, bottom)) if bottom else None
    return None


def _repeating_value(match: re.Match[str]) -> Fraction | None:
    """The number of `0.1\\overline{6}` or `0.1666...`; None where the digits show no period."""
    if match.group(3) is not None:
        whole, fixed, period = match.group(1), match.group(2), match.group(3)
    else:
        whole, digits = match.group(4), match.group(5)
        if (found := _split_period(digits)) is None:
            return None
        fixed, period = found
    start = Fraction(int((whole or "") + fixed or "0"), 10 ** len(fixed))
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def _split_period(digits: str) -> tuple[str, str] | None:
    """Digits before the period, and the period: one digit three times, or more digits twice, at the end."""
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        if digits.endswith(period * (3 if length == 1 else 2)):
            fixed = digits
            while fixed.endswith(period):
                fixed = fixed[:-length]
            return fixed, period
    return None
