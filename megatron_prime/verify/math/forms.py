"""What counts as a final form: an answer from which nothing is left to be carried out (docs/reference/verifiers.md).

Equality alone would let the question be its own answer. So an answer that equals the truth is also asked which
operations it leaves open, and may leave open only those that the truth itself does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from megatron_prime.verify.math.evaluate import Exact, exact, rational
from megatron_prime.verify.math.expression import Node, letters

_EVALUATING = ("binomial", "absolute", "floor", "ceiling", "degree")
_LOGARITHMS = ("ln", "log", "lg")


def is_final(answer: Node, truth: Node) -> bool:
    """Whether an answer that equals the truth is as far evaluated as the truth.

    Raises:
        TooLarge, Undefined: of `evaluate`.
    """
    if answer == truth:
        return True
    if is_literal(answer):
        return not (_whole(truth) and _is_fraction(answer)) or _is_fraction(truth)
    if is_literal(truth):
        return False
    if open_operations(answer) - open_operations(truth):
        return False
    if _num_calls(answer) > _num_calls(truth) + 1:
        return False
    return not (_is_factored(truth) and _stripped(answer).kind == "sum")


def _whole(node: Node) -> bool:
    value = rational(node)
    return value is not None and value.denominator == 1


def is_literal(node: Node) -> bool:
    """A number as one writes it down: `-7`, `3/4`, `1.5`, `2 1/2`, `6.02 * 10^23`."""
    node = node.args[0] if node.kind == "negative" else node
    if node.kind == "number":
        return True
    if node.kind == "quotient":
        return all(_is_integer(part) for part in node.args)
    if node.kind == "product" and len(node.args) == 2:
        return _stripped(node.args[0]).kind == "number" and _is_power_of_ten(node.args[1])
    return _is_power_of_ten(node)


def _is_integer(node: Node) -> bool:
    node = _stripped(node)
    return node.kind == "number" and isinstance(node.value, Fraction)


def _is_fraction(node: Node) -> bool:
    return _stripped(node).kind == "quotient"


def _is_power_of_ten(node: Node) -> bool:
    return node.kind == "power" and node.args[0].value == 10 and _is_integer(node.args[1])


def _stripped(node: Node) -> Node:
    """Without signs in front."""
    while node.kind == "negative":
        node = node.args[0]
    return node


def open_operations(node: Node) -> frozenset[str]:
    """Names of the operations that a formula leaves to its reader."""
    return frozenset(_open(node))


def _open(node: Node) -> Iterator[str]:
    for arg in node.args:
        yield from _open(arg)
    constant = not letters(node)
    if node.kind == "sum":
        yield from _open_sum(node)
    elif node.kind in ("product", "quotient"):
        yield from _open_product(node)
    elif node.kind == "power":
        yield from _open_power(node)
    elif node.kind == "root":
        yield from _open_root(node)
    elif node.kind == "call":
        if constant and node.value != "exp":
            yield _family(str(node.value))
    elif node.kind == "factorial" or (node.kind in _EVALUATING and constant):
        yield node.kind


def _terms(node: Node) -> Iterator[Node]:
    """The terms of a sum, of sums in brackets too, without their signs."""
    node = _stripped(node)
    if node.kind == "sum":
        for arg in node.args:
            yield from _terms(arg)
    else:
        yield node


def _family(function: str) -> str:
    if function in _LOGARITHMS:
        return "logarithm"
    return "inverse" if function.startswith("arc") else "trigonometry"


def _open_sum(node: Node) -> Iterator[str]:
    keys: Counter[tuple[str, ...]] = Counter()
    for term in _terms(node):
        factors, divisors = _factors(term)
        value = exact(term)
        if value is not None:
            keys[("real",) if not value[1] else ("imaginary",) if not value[0] else ("complex",)] += 1
            continue
        key = [repr(f) for f in factors if exact(f) is None] + ["/" + repr(f) for f in divisors if exact(f) is None]
        keys[tuple(sorted(key))] += 1
    if max(keys.values()) > 1 or (keys[("complex",)] and len(keys) > 1):
        yield "addition"
    terms = list(_terms(node))
    for term in terms:
        part = _sum_factor(term)
        linked = [] if part is None else [t for t in terms if t is not term and letters(t) & letters(part)]
        if linked and (_is_scaled_sum(term) or any(_sum_factor(t) is not None for t in linked)):
            yield "expansion"
            return


def _is_scaled_sum(term: Node) -> bool:
    """A sum times or over a number, as in `2(x + 1)`: there is nothing to it but to multiply it out."""
    above, below = _factors(term)
    variable = [factor for factor in above if letters(factor)]
    return len(variable) == 1 and _stripped(variable[0]).kind == "sum" and not any(map(letters, below))


def _sum_factor(term: Node) -> Node | None:
    """A factor of a term that is a sum with variables, or a power of one."""
    for factor in _factors(term)[0]:
        base = _stripped(factor.args[0] if factor.kind == "power" else factor)
        if base.kind == "sum" and letters(base):
            return base
    return None


def _factors(node: Node) -> tuple[list[Node], list[Node]]:
    """What a product multiplies and what it divides by."""
    node = _stripped(node)
    if node.kind == "product":
        above, below = [], []
        for arg in node.args:
            more, less = _factors(arg)
            above += more
            below += less
        return above, below
    if node.kind == "quotient":
        (top, top_below), (bottom, bottom_below) = map(_factors, node.args)
        return top + bottom_below, top_below + bottom
    return [node], []


def _open_product(node: Node) -> Iterator[str]:
    above, below = _factors(node)
    numbers = [f for f in above if rational(f) is not None and not _is_power_of_ten(f) and rational(f) != 1]
    divisors = [f for f in below if rational(f) is not None and not _is_power_of_ten(f)]
    fractions = [f for f in numbers if (rational(f) or Fraction(0)).denominator != 1]
    if len(numbers) > 1 or len(divisors) > 1 or (fractions and divisors):
        yield "multiplication"
    elif numbers and divisors and not is_literal(node) and _shared(numbers[0], divisors[0]):
        yield "division"
    sums = [f for f in above if not letters(f) and _stripped(f).kind == "sum"]
    imaginary = [f for f in above if not letters(f) and _is_imaginary(f)]
    # 5(1 + sqrt 2) is one number in factored form; (1 + 2i)6 and i(2 + i) are not.
    if len(sums) > 1 or (any(map(_is_imaginary, sums)) and len(numbers) + len(imaginary) > 1) or len(imaginary) > 1:
        yield "multiplication"
    if any(_is_open_divisor(f, numbers) for f in below):
        yield "division"
    if sum(_stripped(f).kind == "root" for f in above) > 1:
        yield "multiplication"
    bases = Counter(_base(f) for f in above + below)
    if any(count > 1 for base, count in bases.items() if base.kind in ("letter", "constant")):
        yield "cancellation"


def _is_open_divisor(divisor: Node, numbers: list[Node]) -> bool:
    """Divisors that one gets rid of: complex ones, sums with roots or fractions, roots that divide the number above."""
    if letters(divisor):
        return False
    if exact(divisor) is not None:
        return rational(divisor) is None
    inner = _stripped(divisor)
    if inner.kind == "sum":
        return any(kind in ("root", "quotient") for kind in _kinds(inner))
    return inner.kind == "root" and any(_shared(number, inner.args[0]) for number in numbers)


def _shared(top: Node, bottom: Node) -> bool:
    a, b = rational(top), rational(bottom)
    if a is None or b is None or a.denominator != 1 or b.denominator != 1:
        return False
    return math.gcd(a.numerator, b.numerator) > 1


def _is_imaginary(node: Node) -> bool:
    value: Exact | None = exact(node)
    return value is not None and value[1] != 0


def _base(node: Node) -> Node:
    return node.args[0] if node.kind == "power" else node


def _open_power(node: Node) -> Iterator[str]:
    base, exponent = node.args
    count = rational(exponent) if not letters(exponent) else None
    whole = count is not None and count.denominator == 1
    of_letters = letters(base) and (base.kind == "root" or (base.kind in ("product", "quotient") and whole))
    if base.kind == "power" or of_letters:
        yield "power"
    if letters(node):
        return
    if count is None:
        if _stripped(base).kind == "sum":
            yield "power"
        return
    if exact(node) is not None and not _is_power_of_ten(node):
        yield "power" if count.denominator == 1 else "root"
    elif count.denominator == 1 and _stripped(base).kind in ("sum", "root", "product", "quotient"):
        yield "power"


def _open_root(node: Node) -> Iterator[str]:
    radicand, degree = node.args
    if exact(node) is not None and not letters(node):
        yield "root"
        return
    if any(kind in ("root", "call") for kind in _kinds(radicand)) and not letters(radicand):
        yield "nested root"
    value, count = rational(radicand) if not letters(radicand) else None, rational(degree)
    if value is None or count is None or not 0 < count <= _MAX_DEGREE:
        return
    if value < 0 or any(_has_power(part, int(count)) for part in (abs(value.numerator), value.denominator)):
        yield "root"


def _kinds(node: Node) -> Iterator[str]:
    yield node.kind
    for arg in node.args:
        yield from _kinds(arg)


def _has_power(value: int, degree: int) -> bool:
    """Whether a number has a factor that is a square (cube, ..) of a small number."""
    return any(value % prime**degree == 0 for prime in _SMALL_PRIMES)


_MAX_DEGREE = 64
_SMALL_PRIMES = tuple(p for p in range(2, 200) if all(p % d for d in range(2, math.isqrt(p) + 1)))


def _num_calls(node: Node) -> int:
    return sum(kind == "call" for kind in _kinds(node))


def _is_factored(node: Node) -> bool:
    """A product of two sums with variables or more."""
    count = Fraction(0)
    for factor in _factors(node)[0]:
        base = _stripped(_base(factor))
        if base.kind == "sum" and letters(base):
            times = rational(factor.args[1]) if factor.kind == "power" else Fraction(1)
            count += times if times is not None else 1
    return count >= 2
