"""Cuts mathematics, in LaTeX or plain text, into tokens. Nothing is evaluated, and nothing is skipped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


class Unreadable(ValueError):
    """Text that is not mathematics of the kinds that are compared here."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a formula."""

    kind: Literal["number", "letter", "command", "symbol", "word"]
    text: str


_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth ln log lg exp"
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
"""Names of functions of one argument, as LaTeX has them."""
_ALIASES = {name: "\\" + name for name in FUNCTIONS}
_ALIASES |= {"a" + name: r"\arc" + name for name in ("sin", "cos", "tan")}
_ALIASES |= {
    "infinity": r"\infty",
    "infty": r"\infty",
    "inf": r"\infty",
    "pi": r"\pi",
    "sqrt": r"\sqrt",
    "abs": r"\abs",
}
_NAMES = re.compile("|".join(sorted(_ALIASES, key=len, reverse=True)))
_GREEK_LETTERS = r"""
\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu \nu \xi \rho
\sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Sigma \Phi \Psi \Omega \ell
"""
_LAYOUT = r"""
\left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \bigm
\displaystyle \textstyle \limits \nolimits \! \, \; \: \> \quad \qquad \$ \( \) \[ \] \mathopen \mathclose
"""
_GREEK = frozenset(_GREEK_LETTERS.split())
_IGNORED = frozenset([*_LAYOUT.split(), "\\ "])
_SYNONYM_LIST = r"""
\dfrac \frac  \tfrac \frac  \cfrac \frac  \dbinom \binom  \tbinom \binom  \leq \le  \geq \ge  \leqslant \le
\geqslant \ge  \neq \ne  \lt <  \gt >  \lbrace \{  \rbrace \}  \varnothing \emptyset  \times *  \cdot *  \ast *
\div /  \lvert |  \rvert |  \vert |  \dots \ldots  \cdots \ldots  \simeq \approx  \colon :  \lor ,  \vee ,  \land ,
\wedge ,  \iff \to  \implies \to  \Rightarrow \to  \prime '
"""
_SYNONYMS: dict[str, str] = dict(zip(_SYNONYM_LIST.split()[::2], _SYNONYM_LIST.split()[1::2], strict=True))
_PLAIN = {"**": "^", "<=": r"\le", ">=": r"\ge", "!=": r"\ne", "...": r"\ldots", "->": r"\to"}
_STYLES = "text|textnormal|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mbox|rm"
_STYLE = rf"\\(?:{_STYLES}|operatorname\*?)\s*\{{([^{{}}]*)\}}"
_PATTERN = re.compile(
    rf"{_STYLE}"
    r"|\\mathbb\s*\{?\s*([A-Z])\s*\}?"
    r"|(\\(?:[a-zA-Z]+|.))"
    r"|((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|([A-Za-z]+)"
    r"|(\*\*|<=|>=|!=|->|\.\.\.+)"
    r"|(\s+|[$~])"
    r"|(.)",
    re.DOTALL,
)
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor"}
_OPENING |= {r"\lceil": r"\rceil", r"\begin": r"\end"}
_CLOSING = frozenset(_OPENING.values())
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def tokenize(text: str) -> list[Token]:
    """The tokens of a formula; spaces and sizes of brackets are dropped, synonyms are made one.

    Args:
        text: LaTeX or plain text, cleaned by `normalize.clean_unicode`.
    """
    tokens: list[Token] = []
    for match in _PATTERN.finditer(_without_separators(_ENVIRONMENT.sub(_environment, text))):
        styled, field, command, number, letters, plain, space, symbol = match.groups()
        if space is not None:
            continue
        if styled is not None:
            tokens += _styled(styled.strip(), match.group().startswith(r"\text") or match.group().startswith(r"\mbox"))
        elif field is not None:
            tokens.append(Token("command", rf"\mathbb{field}"))
        elif command is not None:
            tokens += _command(command)
        elif number is not None:
            tokens.append(Token("number", number))
        elif letters is not None:
            tokens += _letters(letters)
        else:
            sign = _PLAIN.get(plain[:3], plain) if plain else symbol
            tokens.append(Token("symbol" if sign.isascii() else "word", sign))
    return tokens


_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{\s*([a-zA-Z]*)\*?\s*\}(?:(?<=array\})\s*\{[^{}]*\})?")
_MATRICES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"})


def _environment(match: re.Match[str]) -> str:
    # Determinants, cases and the like are no matrices.
    return f"\\{match.group(1)} " if match.group(2) in _MATRICES else r"\environment "


def _without_separators(text: str) -> str:
    """Thousands separators go where no comma of the text can mean anything else."""
    commas = sum(match.group().count(",") for match in _GROUPED.finditer(text))
    bracketed = any(char in text for char in "([")
    if commas and commas == text.count(",") and not bracketed:
        return _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
    return text


def _command(command: str) -> list[Token]:
    command = _SYNONYMS.get(command, command)
    if command in _IGNORED:
        return []
    if command in _GREEK:
        return [Token("letter", command)]
    return [Token("command" if command.startswith("\\") else "symbol", command)]


def _styled(content: str, is_text: bool) -> list[Token]:
    """What stands in `\\text{..}`, `\\mathrm{..}` and the like."""
    words = content.strip(" ,")
    if words in ("and", "or") or (not words and content):
        return [Token("symbol", ",")]
    if "\\" + words in (r"\pi", r"\infty") or words in FUNCTIONS:
        return [Token("command", "\\" + words)]
    if re.fullmatch(r"[A-Za-z]", words) and not is_text:
        return [Token("letter", words)]
    if re.fullmatch(r"\d+(?:\.\d+)?", words):
        return [Token("number", words)]
    return [Token("word", words)] if words else []


def _letters(run: str) -> list[Token]:
    """A run of letters: the names of functions and constants in it, and variables for the others."""
    if run in ("and", "or"):
        return [Token("symbol", ",")]
    tokens: list[Token] = []
    position = 0
    while position < len(run):
        name = _NAMES.match(run, position)
        tokens.append(Token("command", _ALIASES[name.group()]) if name else Token("letter", run[position]))
        position = name.end() if name else position + 1
    return tokens


def split(tokens: Sequence[Token], separators: frozenset[str]) -> tuple[list[list[Token]], list[str]]:
    """Cuts a formula at separators outside of all brackets.

    Returns:
        The parts, and the separators between them.

    Raises:
        Unreadable: brackets do not match up; intervals such as ``(a, b]`` are fine.
    """
    parts: list[list[Token]] = [[]]
    found: list[str] = []
    open_brackets: list[str] = []
    for token in tokens:
        text = token.text if token.kind in ("symbol", "command") else ""
        if text in _OPENING:
            open_brackets.append(text)
        elif text in _CLOSING:
            if not open_brackets or not _fits(open_brackets.pop(), text):
                raise Unreadable("brackets do not match up")
        elif text in separators and not open_brackets:
            found.append(text)
            parts.append([])
            continue
        parts[-1].append(token)
    if open_brackets:
        raise Unreadable("a bracket is never closed")
    return parts, found


def _fits(opening: str, closing: str) -> bool:
    return _OPENING[opening] == closing or (opening in ("(", "[") and closing in (")", "]"))


def enclosed(tokens: Sequence[Token]) -> bool:
    """Whether the first token opens a bracket that the last one closes."""
    depth = 0
    for position, token in enumerate(tokens):
        text = token.text if token.kind in ("symbol", "command") else ""
        if text in _OPENING:
            depth += 1
        elif text in _CLOSING:
            depth -= 1
        if depth == 0:
            return position == len(tokens) - 1 and position > 0
    return False
