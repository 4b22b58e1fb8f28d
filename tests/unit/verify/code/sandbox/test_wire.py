"""The messages across the wall: plain data comes through exactly, nothing else comes through at all."""

import contextlib
import json
import os
import time
from collections import Counter, OrderedDict, deque
from decimal import Decimal
from fractions import Fraction

import pytest
from code_cases import squares_problem, statuses_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prime.verify.code.judge import Limits
from megatron_prime.verify.code.sandbox import wire
from megatron_prime.verify.code.scoring import NOT_RUN, STATUSES

SHORT = Limits(test_seconds=0.1, total_seconds=1.0)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False)
)
hashable = st.recursive(scalars, lambda s: st.tuples(s, s) | st.frozensets(s, max_size=3), max_leaves=4)
data = st.recursive(
    scalars,
    lambda s: (
        st.lists(s, max_size=4)
        | st.tuples(s, s)
        | st.dictionaries(hashable, s, max_size=3)
        | st.sets(hashable, max_size=3)
    ),
    max_leaves=12,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda s: (
        st.lists(s, max_size=3)
        | st.dictionaries(
            st.sampled_from(["list", "dict", "set", "int", "handle", "range", "complex", "x"]), s, max_size=2
        )
    ),
    max_leaves=10,
)


@given(data)
def test_plain_data_comes_through(value):
    back = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (10**5000, 10**5000),
        (-(10**5000), -(10**5000)),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (deque([1, 2]), deque([1, 2])),
        (range(3), range(3)),
        (bytearray(b"x"), bytearray(b"x")),
        ("\ud800", "\ud800"),
        (Decimal("1.50"), Decimal("1.50")),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_become_their_base(value, plain):
    back = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert back == plain and type(back) is type(plain)


def test_objects_of_a_program_are_stripped_of_their_methods():
    class Liar(int):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

    back = wire.decode(wire.encode([Liar(0)]))
    assert type(back[0]) is int and back[0] != 1
    with pytest.raises(TypeError, match="object is no plain data"):
        wire.encode(object())
    assert wire.encode([object()], lambda value: 5) == {"list": [{"handle": 5}]}


@given(json_values)
def test_what_was_never_encoded_is_refused(message):
    with contextlib.suppress(wire.WireError, RecursionError):
        wire.decode(message)


PRIME = 2**61 - 1
COLLIDING = [{"int": format(k * PRIME, "x")} for k in range(200_000)]
"""Their hashes are all 0."""
BOMBS = {
    "exponent of a fraction": {"Fraction": "1e200000000"},
    "digits of a fraction": {"Fraction": "1" * 2**20},
    "exponent of a decimal": {"Decimal": "1e999999999999999999"},
    "digits of a decimal": {"Decimal": "1" * 2**20},
    "no text": {"Decimal": [0, [1], 0]},
    "set": {"set": COLLIDING},
    "frozen set": {"frozenset": COLLIDING},
    "dictionary": {"dict": [[key, 0] for key in COLLIDING]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_values_that_are_short_to_send_and_long_to_build_are_refused(name):
    start = time.monotonic()
    with pytest.raises(wire.WireError):
        wire.decode(BOMBS[name])
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize(
    "text", ["0", "-0", "1.50", "0E-10", "-1.2E+999999", "1E-999999", "NaN", "-sNaN12", "-Infinity", "7" * 5000]
)
def test_all_decimals_of_usual_contexts_come_through(text):
    value = Decimal(text)
    assert wire.decode(wire.encode(value)).compare_total(value) == 0


def test_tables_with_some_equal_hashes_come_through():
    table = {2**k: k for k in range(500)} | {-1: 0, -2: 0}
    assert wire.decode(wire.encode(table)) == table and wire.decode(wire.encode(set(table))) == set(table)


def test_only_the_tags_that_a_reader_asks_for_are_accepted():
    assert wire.decode(wire.encode(([1], {2: 3})), only=("list", "tuple", "dict")) == ([1], {2: 3})
    for value in ({1}, [(1, {2})], {1: {2}}, {frozenset(): 1}):
        with pytest.raises(wire.WireError, match="set"):
            wire.decode(wire.encode(value), only=("list", "tuple", "dict"))


@given(st.lists(st.binary(max_size=12)))
def test_any_bytes_are_frames_or_an_error(parts):
    frames = wire.Frames()
    with contextlib.suppress(wire.WireError):
        for part in parts:
            frames.feed(part)


@given(st.lists(json_values, max_size=4), st.integers(1, 7))
def test_frames_may_arrive_in_any_pieces(messages, size):
    stream = b"".join(map(wire.frame, messages))
    frames, received = wire.Frames(), []
    for start in range(0, len(stream), size):
        received += frames.feed(stream[start : start + size])
    assert json.dumps(received) == json.dumps(messages)


def test_a_pipe_that_closes_is_an_error():
    reader, writer = os.pipe()
    os.write(writer, wire.frame([1])[:-1])
    os.close(writer)
    with pytest.raises(wire.WireError, match="gone"):
        wire.receive(reader)
    os.close(reader)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | json_values.map(wire.frame), st.sampled_from([3, 4]), st.booleans())
def test_a_program_that_speaks_the_protocol_gains_nothing(fork_server, noise, descriptor, called):
    forge = f"import os\ntry: os.write({descriptor}, {noise!r})\nexcept OSError: pass\n"
    call = f"{forge}\ndef f(n):\n    os.write({descriptor}, {noise!r})\n    return 0"
    content = squares_problem("f") if called else squares_problem()
    statuses = statuses_of(fork_server, content, call if called else forge, SHORT, stop_at_failure=True)
    assert set(statuses) <= {*STATUSES, NOT_RUN} and "pass" not in statuses
