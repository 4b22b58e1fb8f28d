"""Whether an answer says the same as the truth, and says it in a final form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from megatron_prime.verify.math.evaluate import TooLarge, Undefined, close, equal, numeric, proportional, rational
from megatron_prime.verify.math.expression import Node, letters
from megatron_prime.verify.math.forms import is_final, is_literal
from megatron_prime.verify.math.structure import ELLIPSIS, INFINITY, Value

MAX_UNORDERED = 60
"""Items of a list whose order does not count."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a data set allows."""

    tolerance: Fraction | None = None
    """By how much a number may be off."""
    any_form: bool = False
    """Whether an answer may be an expression that is still to be evaluated."""


STRICT = Rules()
"""Nothing but equality, in a final form."""


def same(truth: Value, answer: Value, rules: Rules = STRICT) -> bool:
    """Compares two answers.

    Args:
        truth: of the data set.
        answer: of the model.
        rules: what is allowed beside equality.

    Raises:
        TooLarge: values beyond all bounds.
        Unreadable: parts that have no value.
    """
    if not _names_agree(truth, answer):
        return False
    if truth.kind == "chain":
        truth = truth.items[0 if r"\approx" in truth.text else -1]
    if answer.kind == "chain":
        return _same_chain(truth, answer, rules)
    if "named" in (truth.kind, answer.kind):
        return _same_named(truth, answer, rules)
    if "equation" in (truth.kind, answer.kind):
        return _same_equation(truth, answer)
    if {truth.kind, answer.kind} == {"ratio", "formula"}:
        return _same_ratio(truth, answer, rules)
    if {truth.kind, answer.kind} <= {"list", "set"}:
        return _same_unordered(truth.items, answer.items, rules)
    if truth.kind != answer.kind:
        return _same_in_one(truth, answer, rules)
    return _same_kind(truth, answer, rules)


def _same_kind(truth: Value, answer: Value, rules: Rules) -> bool:
    if truth.kind == "formula":
        return _same_formula(truth.node, answer.node, rules)
    if truth.kind == "words":
        return truth.text.casefold() == answer.text.casefold()
    if truth.kind == "inequality":
        return truth.text == answer.text and _are_proportional(truth.node, answer.node) == 1
    if truth.kind == "union":
        return _same_unordered(truth.items, answer.items, rules)
    return truth.text == answer.text and _same_ordered(truth.items, answer.items, rules)


def _same_formula(truth: Node | None, answer: Node | None, rules: Rules) -> bool:
    if truth is None or answer is None:
        return False
    try:
        if rules.any_form or is_final(answer, truth):
            return equal(truth, answer, rules.tolerance) or _rounds_to(truth, answer)
        return rules.tolerance is not None and is_literal(answer) and equal(truth, answer, rules.tolerance)
    except Undefined:
        return False


_MIN_ROUNDED_DIGITS = 8


def _rounds_to(truth: Node, answer: Node) -> bool:
    """Whether the truth is a fraction or root of the answer, cut off after eight digits or more."""
    value = rational(truth) if is_literal(truth) else None
    if value is None or letters(answer) or value.denominator == 1:
        return False
    digits = len(str(abs(value.numerator)))
    places = 0
    while 10**places % value.denominator and places <= 40:
        places += 1
    if places > 40 or digits < _MIN_ROUNDED_DIGITS:
        return False
    exactly = rational(answer)
    if exactly is not None and 10**40 % exactly.denominator == 0:
        # Another decimal number is not what the truth was rounded from.
        return False
    return close(numeric(truth), numeric(answer), Fraction(1, 10**places))


def _names_agree(truth: Value, answer: Value) -> bool:
    """`x = 5` is not `y = 5`; a function's name and a variable's may stand for each other."""
    names = [value.name for value in (truth, answer)]
    if not all(names) or names[0] == names[1] or truth.kind == "equation":
        return True
    return not all(len(name) == 1 and name.isalpha() for name in names)


def _same_chain(truth: Value, answer: Value, rules: Rules) -> bool:
    """Sides said to be equal: all must be, and the last exact one is the answer; approximations must round to it."""
    relations = answer.text.split()
    count = 1 + next((n for n, relation in enumerate(relations) if relation == r"\approx"), len(relations))
    exact, rounded = answer.items[:count], answer.items[count:]
    if any(one == other for one, other in pairwise(exact)):
        # `0 = 0` is true of anything.
        return False
    free = Rules(rules.tolerance, any_form=True)
    final = exact[-1]
    # `x = sqrt(2) \approx 1.41` where the truth is 1.41.
    if not same(truth, final, rules) and (len(rounded) != 1 or not same(truth, rounded[0], rules)):
        return False
    if any(side.kind != "formula" or letters(side.node or INFINITY) for side in (*exact[:-1], *rounded)):
        return all(same(side, final, free) for side in (*exact[:-1], *rounded))
    return all(same(final, side, free) for side in exact[:-1]) and all(_is_rounded(final, side) for side in rounded)


def _is_rounded(exactly: Value, rounded: Value) -> bool:
    """Whether a decimal number is another one, or a formula, to the digits that it has."""
    if exactly.node is None or rounded.node is None or not is_literal(rounded.node):
        return False
    value = rational(rounded.node)
    if value is None:
        return False
    places = next((n for n in range(60) if 10**n % value.denominator == 0), None)
    try:
        # Cut off or rounded: less than one unit of the last digit.
        unit = Fraction(999_999, 1_000_000 * 10 ** (places or 0))
        return places is not None and close(numeric(exactly.node), numeric(rounded.node), unit)
    except (Undefined, TooLarge):
        return False


def _same_named(truth: Value, answer: Value, rules: Rules) -> bool:
    """`a = 1, b = 2`, also as `(1, 2)` or `1, 2`."""
    if truth.kind == answer.kind:
        by_name = {item.name: item for item in answer.items}
        same_names = by_name.keys() == {item.name for item in truth.items}
        return same_names and all(same(item, by_name[item.name], rules) for item in truth.items)
    other = answer if truth.kind == "named" else truth
    if other.kind not in ("list", "tuple") or (other.kind == "tuple" and other.text != "()"):
        return False
    return _same_ordered(truth.items, answer.items, rules)


def _same_equation(truth: Value, answer: Value) -> bool:
    """Equations of a curve, the same but for a factor; one that is to be solved is not its solution."""
    sides = [_as_equation(value) for value in (truth, answer)]
    if sides[0] is None or sides[1] is None:
        return False
    if answer.kind == "equation" and truth.kind != "equation" and len(letters(sides[1])) < 2:
        return False
    return proportional(sides[0], sides[1]) != 0


def _as_equation(value: Value) -> Node | None:
    if value.kind == "equation":
        return value.node
    if value.kind == "formula" and value.node is not None and len(value.name) == 1 and value.name.isalpha():
        return Node("sum", (Node("letter", value=value.name), Node("negative", (value.node,))))
    return None


def _are_proportional(one: Node | None, other: Node | None) -> int:
    return 0 if one is None or other is None else proportional(one, other)


def _same_ratio(truth: Value, answer: Value, rules: Rules) -> bool:
    ratio, formula = (truth, answer) if truth.kind == "ratio" else (answer, truth)
    parts = [item.node for item in ratio.items]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return False
    quotient = Value("formula", node=Node("quotient", (parts[0], parts[1])))
    return same(quotient, formula, rules) if truth is ratio else same(formula, quotient, rules)


def _same_in_one(truth: Value, answer: Value, rules: Rules) -> bool:
    """A union or set of one item is that item; `x < 3 or x > 5` is a union; a modulus may be implied."""
    if truth.kind == "congruence":
        return same(truth.items[0], answer, rules)
    if {truth.kind, answer.kind} == {"union", "list"}:
        parts = (answer if answer.kind == "list" else truth).items
        return all(part.name for part in parts) and _same_unordered(truth.items, answer.items, rules)
    for value, other in ((truth, answer), (answer, truth)):
        if value.kind in ("union", "set") and len(value.items) == 1 and other.kind in ("tuple", "formula"):
            item = value.items[0]
            return same(item, other, rules) if value is truth else same(other, item, rules)
    return False


def _same_ordered(truth: Sequence[Value], answer: Sequence[Value], rules: Rules) -> bool:
    return len(truth) == len(answer) and all(same(a, b, rules) for a, b in zip(truth, answer, strict=True))


def _same_unordered(truth: Sequence[Value], answer: Sequence[Value], rules: Rules) -> bool:
    if len(truth) != len(answer) or len(truth) > MAX_UNORDERED:
        return False
    if ELLIPSIS in truth or ELLIPSIS in answer:
        return _same_ordered(truth, answer, rules)
    left = list(answer)
    for item in truth:
        found = next((n for n, other in enumerate(left) if same(item, other, rules)), None)
        if found is None:
            return False
        left.pop(found)
    return True
