"""Reads one formula into a tree, strictly: what is not understood to its last token is not read at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_prime.verify.math.tokens import FUNCTIONS, Token, Unreadable

MAX_NUMBER_CHARS = 4000
"""Python refuses to read integers that are not much longer."""
MAX_DECIMAL_EXPONENT = 1000
_TIMES, _OVER = "*", "/"
_SIGNS = {"+", "-", r"\pm", r"\mp"}
_GROUPS = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a formula.

    Kinds and what they hold: ``number`` (value), ``letter`` (value: name; ``e``, ``i``, ``pi`` and ``infinity`` are
    ``constant``), ``sum``, ``product``, ``quotient``, ``power``, ``root`` (radicand, degree), ``negative``,
    ``plus_minus`` (value: the upper sign), ``call`` (value: function), ``factorial``, ``binomial``, ``absolute``,
    ``floor``, ``ceiling``, ``degree``.
    """

    kind: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | None = None


def number(value: int | Fraction) -> Node:
    """A number as a tree."""
    return Node("number", value=Fraction(value))


def parse(tokens: Sequence[Token]) -> Node:
    """Reads a formula.

    Raises:
        Unreadable: something in it is no arithmetic; also sums, integrals, limits and the like.
    """
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.peek() is not None:
        raise Unreadable(f"unexpected {parser.peek()}")
    return node


class _Parser:
    """Recursive descent, one method per level of binding."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = list(tokens)
        self._position = 0
        self._num_bars = 0

    def peek(self) -> str | None:
        """Text of the next token; None at the end."""
        return self._tokens[self._position].text if self._position < len(self._tokens) else None

    def _kind(self) -> str:
        return self._tokens[self._position].kind if self._position < len(self._tokens) else ""

    def _take(self) -> Token:
        if self._position >= len(self._tokens):
            raise Unreadable("the formula ends too early")
        self._position += 1
        return self._tokens[self._position - 1]

    def _accept(self, text: str) -> bool:
        if self.peek() == text:
            self._position += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise Unreadable(f"{text} is missing")

    def sum(self) -> Node:
        """Terms with signs between them."""
        terms = [self._signed_term(self._take().text) if self.peek() in _SIGNS else self._term()]
        while self.peek() in _SIGNS:
            sign = self._take().text
            if self.peek() in ("+", "-"):
                terms.append(_signed(sign, self._signed_term(self._take().text)))
            else:
                terms.append(self._signed_term(sign))
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _signed_term(self, sign: str) -> Node:
        return _signed(sign, self._term())

    def _term(self) -> Node:
        node, factors = self._power(), 1
        while True:
            if self._accept(_TIMES):
                node = _product(node, self._signed_power())
            elif self._accept(_OVER):
                node = Node("quotient", (node, self._signed_power()))
            elif self._starts_factor():
                node = self._juxtaposed(node, bare=factors == 1)
            else:
                return node
            factors += 1

    def _starts_factor(self) -> bool:
        text, kind = self.peek(), self._kind()
        if text is None or kind == "word":
            return False
        if text == "|":
            return self._num_bars == 0
        if kind in ("number", "letter") or text in ("(", "[", "{"):
            return True
        return kind == "command" and (text[1:] in FUNCTIONS or text in _ATOMS)

    def _juxtaposed(self, left: Node, *, bare: bool) -> Node:
        """The product with what stands right behind, or the mixed number of both."""
        whole = bare and left.kind == "number" and isinstance(left.value, Fraction) and left.value.denominator == 1
        if self._kind() == "number":
            last = self._tokens[self._position - 1]
            if whole and last.kind == "number":
                top = self._number(self._take().text)
                self._expect("/")
                return _mixed(left, Node("quotient", (top, self._number(self._take().text))))
            if last.kind in ("number", "letter"):
                raise Unreadable("two numbers side by side")
        is_fraction = self.peek() == r"\frac"
        right = self._power()
        if whole and is_fraction and right.kind == "quotient" and all(a.kind == "number" for a in right.args):
            return _mixed(left, right)
        return _product(left, right)

    def _signed_power(self) -> Node:
        if self.peek() in ("+", "-"):
            return _signed(self._take().text, self._power())
        return self._power()

    def _power(self) -> Node:
        node = self._atom()
        while True:
            if self._accept("!"):
                node = Node("factorial", (node,))
            elif self._accept("^"):
                node = self._raised(node)
            else:
                return node

    def _raised(self, base: Node) -> Node:
        if self._accept(r"\circ"):
            return Node("degree", (base,))
        if [token.text for token in self._tokens[self._position : self._position + 3]] == ["{", r"\circ", "}"]:
            self._position += 3
            return Node("degree", (base,))
        if self.peek() in ("+", "-"):
            return Node("power", (base, _signed(self._take().text, self._atom())))
        # 2^{3^2} and 2^3^2 are both read from the right.
        return Node("power", (base, self._power() if self.peek() != "{" else self._atom()))

    def _atom(self) -> Node:
        token = self._take()
        if token.kind == "number":
            return self._number(token.text)
        if token.kind == "letter":
            return self._letter(token.text)
        if token.text in _GROUPS:
            return self._group(token.text)
        if token.text == "|":
            self._num_bars += 1
            inner = self.sum()
            self._num_bars -= 1
            self._expect("|")
            return Node("absolute", (inner,))
        if token.kind == "command":
            return self._command(token.text)
        raise Unreadable(f"unexpected {token.text!r}")

    def _group(self, opening: str) -> Node:
        bars, self._num_bars = self._num_bars, 0
        inner = self.sum()
        self._num_bars = bars
        self._expect(_GROUPS[opening])
        kinds = {r"\lfloor": "floor", r"\lceil": "ceiling"}
        return Node(kinds[opening], (inner,)) if opening in kinds else inner

    def _letter(self, name: str) -> Node:
        if self._accept("_"):
            name += "_" + self._index()
        while self._accept("'"):
            name += "'"
        return Node("constant" if name in ("e", "i") else "letter", value=name)

    def _index(self) -> str:
        token = self._take()
        if token.text != "{":
            return token.text
        index = ""
        while (token := self._take()).text != "}":
            index += token.text
        return index

    def _command(self, name: str) -> Node:
        if name == r"\pi":
            return Node("constant", value="pi")
        if name == r"\infty":
            return Node("constant", value="infinity")
        if name == r"\frac":
            top = self._argument()
            return Node("quotient", (top, self._argument()))
        if name == r"\binom":
            top = self._argument()
            return Node("binomial", (top, self._argument()))
        if name == r"\sqrt":
            degree = self._group("[") if self._accept("[") else number(2)
            return Node("root", (self._argument(), degree))
        if name in _ACCENTS:
            named = self._atom()
            if named.kind != "letter":
                raise Unreadable(f"{name} of what is no letter")
            return Node("letter", value=f"{name}{named.value}")
        if name == r"\abs":
            return Node("absolute", (self._argument(),))
        if name[1:] in FUNCTIONS:
            return self._call(name[1:])
        raise Unreadable(f"{name} is not understood")

    def _argument(self) -> Node:
        """A group, or one token: of a number its first digit."""
        if self._kind() != "number":
            return self._atom()
        digits = self._take().text
        if len(digits) > 1:
            self._position -= 1
            self._tokens[self._position] = Token("number", digits[1:])
        return self._number(digits[0])

    def _call(self, function: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        while self.peek() in ("^", "_"):
            if self._take().text == "_":
                base = self._argument()
            else:
                power = self._signed_exponent()
        if power == Node("negative", (number(1),)):
            function, power = "arc" + function, None
        if base is not None and function != "log":
            raise Unreadable(f"an index of {function}")
        argument = self._atom() if self.peek() in ("(", "{", "[", "|") else self._bare_argument()
        node = Node("call", (argument,) if base is None else (argument, base), function)
        return node if power is None else Node("power", (node, power))

    def _signed_exponent(self) -> Node:
        return Node("negative", (self._atom(),)) if self._accept("-") else self._atom()

    def _bare_argument(self) -> Node:
        """`2x` of `\\sin 2x`: factors side by side, up to the next function."""
        negative = self._accept("-")
        node = self._power()
        while self._starts_factor() and (self.peek() or "")[1:] not in FUNCTIONS and self.peek() not in ("(", "["):
            node = _product(node, self._power())
        return Node("negative", (node,)) if negative else node

    def _number(self, text: str) -> Node:
        if (not text[:1].isdigit() and text[:1] != ".") or len(text) > MAX_NUMBER_CHARS:
            raise Unreadable("no number")
        exponent = text.lower().partition("e")[2]
        if exponent and (len(exponent) > 6 or abs(int(exponent)) > MAX_DECIMAL_EXPONENT):
            raise Unreadable("too large a number")
        return number(Fraction(text))


_ACCENTS = (r"\bar", r"\hat", r"\vec", r"\tilde")
_ATOMS = frozenset({*_ACCENTS, r"\pi", r"\infty", r"\frac", r"\binom", r"\sqrt", r"\abs", r"\lfloor", r"\lceil"})


def _signed(sign: str, node: Node) -> Node:
    if sign == "+":
        return node
    if sign == "-":
        return Node("negative", (node,))
    return Node("plus_minus", (node,), sign)


def _product(left: Node, right: Node) -> Node:
    factors = left.args if left.kind == "product" else (left,)
    return Node("product", (*factors, right))


def _mixed(whole: Node, part: Node) -> Node:
    top, bottom = (arg.value for arg in part.args)
    if not isinstance(whole.value, Fraction) or not isinstance(top, Fraction) or not isinstance(bottom, Fraction):
        raise Unreadable("no mixed number")
    if not bottom or top.denominator != 1 or bottom.denominator != 1:
        raise Unreadable("no mixed number")
    return number(whole.value + top / bottom)


def both_signs(node: Node) -> list[Node]:
    """A formula with its upper signs, and with its lower ones where it has `\\pm`."""
    if not _has_signs(node):
        return [node]
    return [_with_signs(node, r"\pm"), _with_signs(node, r"\mp")]


def _has_signs(node: Node) -> bool:
    return node.kind == "plus_minus" or any(map(_has_signs, node.args))


def _with_signs(node: Node, positive: str) -> Node:
    args = tuple(_with_signs(arg, positive) for arg in node.args)
    if node.kind == "plus_minus":
        return args[0] if node.value == positive else Node("negative", args)
    return Node(node.kind, args, node.value)


def letters(node: Node) -> frozenset[str]:
    """Names of the variables of a formula."""
    if node.kind == "letter":
        return frozenset([str(node.value)])
    return frozenset().union(*map(letters, node.args)) if node.args else frozenset()
