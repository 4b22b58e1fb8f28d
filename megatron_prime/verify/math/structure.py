"""Reads an answer: one formula, or formulas in a list, set, tuple, interval, union, matrix, equation or inequality."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prime.verify.math.expression import Node, both_signs, letters, parse
from megatron_prime.verify.math.tokens import Token, Unreadable, enclosed, split, tokenize

_SEPARATORS = frozenset({",", ";"})
_RELATIONS = frozenset({"=", "<", ">", r"\le", r"\ge", r"\in", r"\ne", r"\approx"})
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_BRACKETS = {"(": ")", "[": "]", r"\langle": r"\rangle"}
INFINITY = Node("constant", value="infinity")
_REALS = (INFINITY, Node("negative", (INFINITY,)))


@dataclass(frozen=True, slots=True)
class Value:
    """What an answer says.

    Kinds: ``formula`` (node); ``list``, ``set`` (items in any order); ``tuple`` (items in order, text: its brackets; an
    interval is one of two items); ``union`` (items); ``matrix`` (items: its rows, lists); ``ratio``;
    ``named`` (items: values of different names, in order, text: the names); ``equation`` (node: left side less right
    side); ``inequality`` (node: less than 0, or at the most 0 where text is ``<=``); ``chain`` (items: sides that are
    said to be equal, text: the relations); ``congruence`` (items: value and modulus); ``words`` (text).
    """

    kind: str
    items: tuple[Value, ...] = ()
    node: Node | None = None
    text: str = ""
    name: str = ""
    """What it is said to be the value of: `x` of `x = 5`."""


ELLIPSIS = Value("words", text="...")
"""An item of a list that stands for others."""


def read(text: str) -> Value:
    """Reads an answer to its last token.

    Raises:
        Unreadable: it is none of these.
    """
    tokens = tokenize(text)
    if not tokens:
        raise Unreadable("nothing")
    return _read_list(tokens)


def _read_list(tokens: Sequence[Token]) -> Value:
    groups, found = split(tokens, frozenset({";"}))
    if found and any(split(group, frozenset({","}))[1] for group in groups):
        rows = [_read_list(group) for group in groups]
        return Value("list", tuple(replace(row, kind="tuple", text="()") if _is_row(row) else row for row in rows))
    parts, found = split(tokens, _SEPARATORS)
    if not found:
        return _read_relation(parts[0])
    items = [_read_relation(part) for part in parts if part]
    if len(items) + 1 < len(parts):
        raise Unreadable("an empty place in a list")
    if len(items) == 1:
        return items[0]
    names = [item.name for item in items]
    if len(set(names)) == len(names) and all(names):
        return Value("named", tuple(items), text=",".join(names))
    flat = [part for item in items for part in (item.items if item.kind == "list" else (item,))]
    return Value("list", tuple(flat), name=names[0])


def _is_row(row: Value) -> bool:
    return row.kind in ("list", "named")


def _read_relation(tokens: Sequence[Token]) -> Value:
    parts, found = split(tokens, frozenset({r"\pmod"}))
    if len(found) == 1:
        head = [Token("symbol", "=") if token.text == r"\equiv" else token for token in parts[0]]
        value = _read_relation(head)
        return Value("congruence", (replace(value, name=""), _read_plain(parts[1])), name=value.name)
    sides, relations = split(tokens, _RELATIONS)
    if not relations:
        return _read_plain(tokens)
    if not sides[0] and relations[0] in (r"\approx", "="):
        return _read_relation(tokens[1:])
    if not all(sides):
        raise Unreadable("a relation with one side")
    if set(relations) <= {"=", r"\approx"}:
        return _read_equality(sides, relations)
    if len(relations) == 1 and relations[0] in (r"\in", r"\ne"):
        return _read_membership(sides, relations[0])
    return _read_inequality(sides, relations)


def _read_equality(sides: Sequence[Sequence[Token]], relations: Sequence[str]) -> Value:
    name, first = "", 0
    while first < len(sides) - 1 and is_name(sides[first]):
        name, first = _spelled(sides[first]), first + 1
    rest = [_read_plain(side) for side in sides[first:]]
    if len(rest) == 1:
        return replace(rest[0], name=name)
    if len(sides) == 2 and relations[0] == "=" and all(side.kind == "formula" for side in rest):
        node = _difference(rest[0], rest[1])
        if letters(node):
            return Value("equation", node=node)
    return Value("chain", tuple(rest), text=" ".join(relations[first:]), name=name)


def _difference(left: Value, right: Value) -> Node:
    if left.node is None or right.node is None:
        raise Unreadable("a relation between what is no formula")
    return Node("sum", (left.node, Node("negative", (right.node,))))


def _read_membership(sides: Sequence[Sequence[Token]], relation: str) -> Value:
    if not is_name(sides[0]):
        raise Unreadable("an element without a name")
    value = _read_plain(sides[1])
    if relation == r"\in":
        return replace(value, name=_spelled(sides[0]))
    if value.kind != "formula" or value.node is None or letters(value.node):
        raise Unreadable("unequal to what is no number")
    return Value("union", (_interval("()", None, value.node), _interval("()", value.node, None)))


def _interval(brackets: str, low: Node | None, high: Node | None) -> Value:
    ends = (low or _REALS[1], high or _REALS[0])
    return Value("tuple", tuple(Value("formula", node=end) for end in ends), text=brackets)


def _read_inequality(sides: Sequence[Sequence[Token]], relations: Sequence[str]) -> Value:
    """`1 < x`, `x \\le 5` and `1 < x \\le 5` are intervals; other inequalities are still to be solved."""
    if not set(relations) <= _FLIPPED.keys():
        raise Unreadable("relations of several kinds")
    if len(sides) == 2 and is_name(sides[0]) and not is_name(sides[1]):
        sides, relations = sides[::-1], [_FLIPPED[relations[0]]]
    if len(sides) == 2 and is_name(sides[1]):
        bound = _read_plain(sides[0]).node
        if bound is not None and not letters(bound):
            return replace(_half_line(bound, relations[0]), name=_spelled(sides[1]))
    if len(sides) == 3 and is_name(sides[1]):
        if relations[0] in (">", r"\ge"):
            sides, relations = sides[::-1], [_FLIPPED[relation] for relation in relations[::-1]]
        low, high = _read_plain(sides[0]).node, _read_plain(sides[2]).node
        if not set(relations) <= {"<", r"\le"} or low is None or high is None:
            raise Unreadable("relations of several kinds")
        if not letters(low) and not letters(high):
            brackets = ("(" if relations[0] == "<" else "[") + (")" if relations[1] == "<" else "]")
            return replace(_interval(brackets, low, high), name=_spelled(sides[1]))
    if len(sides) != 2:
        raise Unreadable("a chain of inequalities")
    if relations[0] in (">", r"\ge"):
        sides, relations = sides[::-1], [_FLIPPED[relations[0]]]
    node = _difference(_read_plain(sides[0]), _read_plain(sides[1]))
    return Value("inequality", node=node, text="<" if relations[0] == "<" else "<=")


def _half_line(bound: Node, relation: str) -> Value:
    """Where `bound relation x` holds."""
    if relation in ("<", r"\le"):
        return _interval("()" if relation == "<" else "[)", bound, None)
    return _interval("()" if relation == ">" else "(]", None, bound)


def _read_plain(tokens: Sequence[Token]) -> Value:
    """Anything without a relation at its top."""
    if not tokens:
        raise Unreadable("nothing")
    if all(token.kind == "word" for token in tokens):
        return Value("words", text=" ".join(token.text for token in tokens))
    texts = [token.text for token in tokens]
    if texts == [r"\ldots"]:
        return ELLIPSIS
    if texts == [r"\mathbbR"]:
        return _interval("()", None, None)
    if texts == [r"\emptyset"]:
        return Value("set")
    parts, found = split(tokens, frozenset({r"\cup"}))
    if found:
        return Value("union", tuple(_read_plain(part) for part in parts))
    parts, found = split(tokens, frozenset({":"}))
    if found:
        return Value("ratio", tuple(_read_plain(part) for part in parts))
    if enclosed(tokens):
        value = _read_enclosed(tokens)
        if value is not None:
            return value
    signed = both_signs(parse(tokens))
    if len(signed) == 1:
        return Value("formula", node=signed[0])
    return Value("list", tuple(Value("formula", node=node) for node in signed))


def _read_enclosed(tokens: Sequence[Token]) -> Value | None:
    """What stands in brackets; None where they are those of one formula."""
    opening, closing, inner = tokens[0].text, tokens[-1].text, tokens[1:-1]
    if opening == r"\begin":
        return _read_matrix(inner)
    if opening == "{":
        return _read_list(inner)
    if opening == r"\{":
        if not inner:
            return Value("set")
        parts, found = split(inner, frozenset({r"\mid"}))
        if len(found) == 1 and is_name(parts[0]):
            # The set of all x with a property: what the property says of x.
            return _read_list(parts[1])
        value = _read_list(inner)
        return replace(value, kind="set", name="") if value.kind in ("list", "named") else Value("set", (value,))
    if opening not in _BRACKETS:
        return None
    if inner and inner[0].text == r"\begin" and enclosed(inner):
        return _read_enclosed(inner)
    parts, found = split(inner, _SEPARATORS)
    if not found:
        if opening == "[" or closing == "]":
            raise Unreadable("square brackets around one formula")
        return None
    brackets = "()" if opening == r"\langle" else opening + closing
    items = tuple(_read_relation(part) for part in parts)
    return Value("tuple", items, text=brackets)


_NAME = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+[^a-z0-9]*)'*(?:_[A-Za-z0-9{}\\]+)?'*(?:\^{-1})?"
    r"|(?:\\angle|\\triangle|\\overline|\\overrightarrow|\\vec|\\bar|\\hat|\\tilde)?\{?[A-Za-z]{1,3}\}?"
    r"|[A-Z]{2,4}|\|[A-Z]{2}\|"
    r"|[fghuvpqFGHPQRSTVANE](?:_[A-Za-z0-9{}]+)?'*(?:\^{-1})?\([^()=<>]*(?:\([^()=<>]*\)[^()=<>]*)?\)"
)


def is_name(tokens: Sequence[Token]) -> bool:
    """Whether one side of a relation only says what the other one is: `x`, `v_1`, `f(2)`, `AB`, `(x, y)`, words.

    Products, sums and numbers are no names: what they are equal to is an equation, which may stand in the question.
    """
    if not tokens:
        return False
    if all(token.kind == "word" for token in tokens):
        return True
    parts, found = split(tokens, frozenset({":"}))
    if found:
        return all(is_name(part) for part in parts)
    if enclosed(tokens) and tokens[0].text == "(":
        parts, found = split(tokens[1:-1], frozenset({","}))
        return bool(found) and all(is_name(part) for part in parts)
    if tokens[-1].kind == "word":
        tokens = tokens[:-1]
    spelled = _spelled(tokens)
    if tokens[0].text in (r"\pi",) or spelled in ("e", "i"):
        return False
    return _NAME.fullmatch(spelled) is not None and not re.fullmatch(r"[a-z]{2,3}", spelled)


def _spelled(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def _read_matrix(tokens: Sequence[Token]) -> Value:
    """The rows of a matrix, given what stands between its `\\begin` and `\\end`."""
    rows = split(tokens, frozenset({"\\\\"}))[0]
    rows = [row for row in rows if row]
    cells = [[_read_plain(cell) for cell in split(row, frozenset({"&"}))[0]] for row in rows]
    if len({len(row) for row in cells}) != 1:
        raise Unreadable("rows of different lengths")
    return Value("matrix", tuple(Value("list", tuple(row)) for row in cells))
