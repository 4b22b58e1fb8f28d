"""Messages between the processes of a run: plain data as tagged JSON, never pickles, in frames with a length.

What comes from a program is data of the types below or a handle to something that stays where it is. Both sides
rebuild exact built-in types, so that no method of the program's own classes ever runs on the reader's side.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_MESSAGE_BYTES = 16 * 2**20
"""Longer messages end the run."""
LOCKED_IN = b"\0"
"""The first byte that a sandboxed process sends to its judge, before it has read what to run: it has no rights left."""
MAX_EQUAL_HASHES = 500
"""Keys of one table whose hash another one has: it takes the square of their number to build."""
_FRACTION = re.compile(r"-?[0-9]+(/[0-9]+)?")
_DECIMAL = re.compile(r"-?([0-9.]{1,100000}(E[+-][0-9]{1,6})?|s?NaN[0-9]{0,30}|Infinity)")
"""As `encode` writes them; other forms are short and stand for numbers that no machine can hold."""
_LENGTH = struct.Struct("=I")


class WireError(Exception):
    """The other side sent no message, a broken one, or too much."""


def frame(message: Any) -> bytes:
    """A message as it goes over the wire.

    Raises:
        WireError: it is too long.
    """
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes is too long")
    return _LENGTH.pack(len(data)) + data


def send(descriptor: int, message: Any) -> None:
    """Writes one message; blocks until the other side has room for it.

    Raises:
        WireError: nobody reads, or the message is too long.
    """
    view = memoryview(frame(message))
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise WireError(f"nobody reads: {error}") from error


def receive(descriptor: int) -> Any:
    """Reads one message; blocks until it is there.

    Raises:
        WireError: the other side has closed, or sent something else.
    """
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {length} bytes is too long")
    return parse(_read(descriptor, length))


def parse(data: bytes) -> Any:
    """The message of a frame's content.

    Raises:
        WireError: it is no JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {error}") from error


class TooLong(WireError):
    """A message beyond the limit."""


class Frames:
    """Cuts a stream that arrives in pieces into messages.

    Args:
        max_bytes: of a message; what a reader without limits of its own builds from one is a multiple of it.
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> list[Any]:
        """The messages completed by some more bytes.

        Raises:
            WireError: the stream holds no such messages.
        """
        self._buffer += data
        messages: list[Any] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise TooLong(f"a message of {length} bytes is too long")
            if len(self._buffer) < _LENGTH.size + length:
                break
            messages.append(parse(bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])))
            del self._buffer[: _LENGTH.size + length]
        return messages


def _read(descriptor: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            part = os.read(descriptor, min(size, 2**20))
        except OSError as error:
            raise WireError(f"nobody writes: {error}") from error
        if not part:
            raise WireError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, handle: Callable[[Any], Any] | None = None) -> Any:
    """A value as JSON: numbers, strings, None and booleans as they are, all else as ``{tag: content}``.

    Instances of subclasses become their built-in base; what has none becomes ``{"handle": ...}``.

    Args:
        value: any object.
        handle: gives the content of a handle; refused where None.

    Raises:
        TypeError: a handle would be needed.
        RecursionError: nested too deeply, or containing itself.
    """
    if value is None or value is True or value is False:
        return value
    for base, tag, rebuild in _SCALARS:
        if isinstance(value, base):
            plain = rebuild(value)
            return plain if tag is None else {tag: plain}
    for base, tag, items in _COLLECTIONS:
        if isinstance(value, base):
            return {tag: [encode(item, handle) for item in items(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, handle), encode(v, handle)] for k, v in dict.items(value)]}
    if hasattr(type(value), "__array__") and hasattr(value, "tolist"):
        return encode(_plain_array(value), handle)
    if handle is None:
        raise TypeError(f"{type(value).__name__} is no plain data")
    return {"handle": handle(value)}


def decode(message: Any, handle: Callable[[Any], Any] | None = None, *, only: Collection[str] | None = None) -> Any:
    """Undoes `encode`.

    Args:
        message: from the other side.
        handle: makes the object that stands for a handle; refused where None.
        only: the tags that are accepted; all where None.

    Raises:
        WireError: not a message of `encode`.
    """
    if message is None or isinstance(message, (bool, int, float, str)):
        return message
    if not isinstance(message, dict) or len(message) != 1:
        raise WireError("no encoded value")
    ((tag, content),) = message.items()
    if only is not None and tag not in only:
        raise WireError(f"no {tag} is accepted")
    try:
        if tag == "handle" and handle is not None:
            return handle(content)
        if tag == "dict":
            pairs = [(decode(key, handle, only=only), decode(value, handle, only=only)) for key, value in content]
            _check_hashes(key for key, _ in pairs)
            return dict(pairs)
        if tag in _READERS:
            return _READERS[tag](content)
        items = [decode(item, handle, only=only) for item in content]
        if tag in ("set", "frozenset"):
            _check_hashes(items)
        return _BUILDERS[tag](items)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise WireError(f"no encoded value: {error}") from error


def _check_hashes(keys: Iterable[Hashable]) -> None:
    """Refuses keys that no program has by chance, before a table of them is built."""
    hashes = list(map(hash, keys))
    # Equal hashes are equal numbers, of which a set keeps one: this table is small, whatever the keys are.
    if len(hashes) - len(set(hashes)) > MAX_EQUAL_HASHES:
        raise WireError(f"{len(hashes)} keys with {len(set(hashes))} hashes")


def _number(pattern: re.Pattern[str], kind: Callable[[str], Any]) -> Callable[[Any], Any]:
    def read(content: Any) -> Any:
        if pattern.fullmatch(content) is None:
            raise ValueError("no number as `encode` writes it")
        return kind(content)

    return read


def _whole(value: int) -> int | dict[str, str]:
    # Python refuses to read decimal integers of more than 4300 digits; hexadecimal has no limit.
    number = int.__index__(value)
    return number if number.bit_length() < 10_000 else {"int": format(number, "x")}


def _plain_array(value: Any) -> Any:
    plain = value.tolist()
    if hasattr(type(plain), "__array__"):
        raise TypeError(f"{type(value).__name__} is no plain data")
    return plain


_SCALARS: list[tuple[type, str | None, Callable[[Any], Any]]] = [
    (int, None, _whole),
    (float, None, float.__float__),
    (str, None, str.__str__),
    (bytes, "bytes", bytes.hex),
    (bytearray, "bytearray", bytearray.hex),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (Decimal, "Decimal", Decimal.__str__),
    (Fraction, "Fraction", Fraction.__str__),
    (range, "range", lambda value: [value.start, value.stop, value.step]),
]
_COLLECTIONS: list[tuple[type, str, Callable[[Any], Any]]] = [
    (list, "list", list.__iter__),
    (tuple, "tuple", tuple.__iter__),
    (set, "set", set.__iter__),
    (frozenset, "frozenset", frozenset.__iter__),
    (deque, "deque", deque.__iter__),
]
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda content: complex(*content),
    "Decimal": _number(_DECIMAL, Decimal),
    "Fraction": _number(_FRACTION, Fraction),
    "range": lambda content: range(*content),
}
_BUILDERS: dict[str, Callable[[Any], Any]] = {tag: base for base, tag, _ in _COLLECTIONS}
