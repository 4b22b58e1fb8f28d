"""Whether values are finite, and checksums of them: what both sides of a refit read every weight for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor

from megatron_prime.weights.shards import ShardSlice

NUM_DIGEST_BYTES = 16
_PIECE_BYTES = 2**22
"""Stays in a cache while it is read again, and takes long enough to read that the calls for it do not count."""
_GROUP_BYTES = 2**24
"""Takes a thread a millisecond, beside which handing it out does not count."""
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}
"""Its bits; those of NaN are beyond."""
_BLOCK_WORDS = 2**15
_ROWS_PER_PASS = {"cpu": 2, "cuda": 512}
"""Blocks handled by one kernel: in the cache on a CPU, few launches and 128 MiB of scratch on a GPU."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size: numpy has no bfloat16."""


def digest(values: Tensor) -> bytes:
    """Checksum of a tensor's values (not of its name or shape, which plans carry).

    XXH3 (xxhash.com) reads at the speed of memory, 27 GB/s on one core; it is for errors, not against adversaries. A
    tensor on an accelerator is copied to the host for it.

    Args:
        values: any dtype, device and strides.
    """
    hashed = xxhash.xxh3_128()
    for piece in _pieces(values):
        hashed.update(piece)
    return hashed.digest()


def examine(slices: Iterable[ShardSlice], num_threads: int) -> tuple[bytes, list[str]]:
    """Reads every value once, for its checksum and for whether it is finite.

    Args:
        slices: what to read.
        num_threads: that read at the same time.

    Returns:
        The slices' checksums, one behind the other, and the names of those that hold NaN or an infinity.
    """
    with ThreadPoolExecutor(num_threads) as threads:
        groups = threads.map(_examine, _in_groups(slices))
        found = [one for group in groups for one in group]
    return b"".join(checksum for _, checksum, _ in found), [name for name, _, is_finite in found if not is_finite]


def find_non_finite(slices: Iterable[ShardSlice]) -> list[str]:
    """Names of the slices that hold NaN or an infinity."""
    return [part.name for part in slices if not _is_finite(part.values)]


def digest_on(device: torch.device, values: Tensor) -> bytes:
    """The checksum that a device computes where it has the values: on a CPU `digest`, elsewhere one that reads no less.

    A GPU reduces every block of 128 KiB to eight bytes (`block_values`), which go to the host for `digest`.

    Args:
        device: both sides of a comparison name the same kind.
        values: any dtype, device and strides.
    """
    values = values.detach().to(device)
    return digest(values if device.type == "cpu" else torch.cat(list(block_values(values))))


def block_values(tensor: Tensor) -> Iterator[Tensor]:
    """Weighted sums of a tensor's blocks, on its device.

    A block's value is the sum of its 32-bit words, each times its own fixed odd 64-bit weight, modulo 2**64
    (multilinear hashing; Lemire and Kaser, "Strongly universal string hashing is fast", 2014). A block in which a
    single word changed has another value, always; any other fixed change keeps it with a probability of at most 2**-32.

    Args:
        tensor: any shape, dtype, device and strides.

    Yields:
        int64 [blocks], a few blocks at a time.
    """
    data = tensor.reshape(-1).contiguous()
    if data.storage_offset() * data.element_size() % 4:
        data = data.clone()  # a view as 32-bit words needs an aligned start
    data = data.view(torch.uint8)
    block_bytes = 4 * _BLOCK_WORDS
    whole = data.numel() // block_bytes * block_bytes
    weights = _weights(data.device)
    rows_per_pass = _ROWS_PER_PASS.get(data.device.type, 2)
    for rows in data[:whole].view(torch.int32).view(-1, _BLOCK_WORDS).split(rows_per_pass):
        yield rows.to(torch.int64).mul_(weights).sum(dim=1)
    if whole < data.numel():
        # The shape is part of the digest, so zero padding cannot be taken for data.
        rest = data.new_zeros(-(-(data.numel() - whole) // 4) * 4)
        rest[: data.numel() - whole] = data[whole:]
        words = rest.view(torch.int32).to(torch.int64)
        yield words.mul_(weights[: len(words)]).sum().view(1)


@cache
def _weights(device: torch.device) -> Tensor:
    """Fixed odd 64-bit weights, int64 [_BLOCK_WORDS]: odd, so that no change of one word can vanish modulo 2**64."""
    random_bytes = hashlib.shake_128(b"megatron_prime.weights.checksum").digest(8 * _BLOCK_WORDS)
    return (torch.frombuffer(bytearray(random_bytes), dtype=torch.int64) | 1).to(device)


def _in_groups(slices: Iterable[ShardSlice]) -> list[list[ShardSlice]]:
    """Consecutive slices, each group of `_GROUP_BYTES` and a slice at most."""
    groups: list[list[ShardSlice]] = []
    size = _GROUP_BYTES
    for part in slices:
        if size >= _GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.values.nbytes
    return groups


def _examine(slices: Sequence[ShardSlice]) -> list[tuple[str, bytes, bool]]:
    """Name, checksum and whether all is finite."""
    found = []
    for part in slices:
        hashed, is_finite = xxhash.xxh3_128(), True
        for piece in _pieces(part.values):
            is_finite = is_finite and _piece_is_finite(piece, part.values.dtype)
            hashed.update(piece)
        found.append((part.name, hashed.digest(), is_finite))
    return found


def _is_finite(values: Tensor) -> bool:
    if values.device.type == "cpu":
        return all(_piece_is_finite(piece, values.dtype) for piece in _pieces(values))
    # A finite sum has finite terms. One that is not may have overflowed: NaN and infinities survive in the extremes.
    if not values.numel() or torch.isfinite(values.sum()):
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _pieces(values: Tensor) -> Iterator[Any]:
    """A tensor's values in order, on the host: arrays of their bits as unsigned integers."""
    size = values.element_size()
    # Of a strided tensor too, so that torch, which would use threads of its own, copies nothing.
    bits = values.detach().cpu().view(_INTEGERS[size]).numpy().view(f"u{size}")
    if bits.flags.c_contiguous:
        # One array for all pieces: making one from a tensor takes as long as reading 100 KB.
        bits, step = bits.reshape(-1), _PIECE_BYTES // size
        for start in range(0, len(bits), step):
            yield bits[start : start + step]
        return
    step = max(_PIECE_BYTES * len(bits) // bits.nbytes, 1)
    for start in range(0, len(bits), step):
        yield numpy.ascontiguousarray(bits[start : start + step]).reshape(-1)


def _piece_is_finite(bits: Any, dtype: torch.dtype) -> bool:
    """As integers, what is not finite is the largest with either sign.

    A sum would do as well, but torch's would start threads of its own in every thread that calls it.
    """
    size = bits.itemsize
    return bool(
        bits.max() < (1 << (8 * size - 1)) | _INFINITY[dtype] and bits.view(f"i{size}").max() < _INFINITY[dtype]
    )
