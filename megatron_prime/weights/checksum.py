"""A checksum of named weights that the trainer and an engine can compute independently and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from megatron_prime.errors import WeightsError

_BLOCK_WORDS = 2**15
_ROWS_PER_PASS = {"cpu": 2, "cuda": 512}
"""Blocks handled by one kernel: in the cache on a CPU, few launches and 128 MiB of scratch on a GPU."""


class WeightChecksum:
    """Digest of a set of named tensors: what they hold, not how or in which order they arrived.

    Each tensor's bytes are read as 32-bit words, in blocks. A block's value is the sum of its words, each times
    its own fixed odd 64-bit weight, modulo 2**64 (multilinear hashing; Lemire and Kaser, "Strongly universal
    string hashing is fast", 2014). Block values in order, name, shape and dtype go through BLAKE2b, and the
    tensors' digests, sorted by name, through BLAKE2b again.

    What it guarantees: a block in which a single word changed has another value, always. Any other fixed change
    of a block, permutations included, keeps its value with a probability of at most 2**-32 over the choice of
    the weights, and a change escapes only if that happens to every block it touches. Floating point is compared
    by its bits: 0.0 and -0.0 differ. It is no protection against an adversary, who can solve for a collision.

    All arithmetic on elements is integer, so the digest is the same on every device. Values are reduced where
    the tensor lives; only 8 bytes per 128 KiB reach the host. One thread of a server CPU takes in about 2.5 GB/s.
    """

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor.

        Args:
            name: its Hugging Face name.
            tensor: any shape, dtype, device and strides.

        Raises:
            WeightsError: the name was added before.
        """
        if name in self._digests:
            raise WeightsError(f"{name}: appears twice in one weight stream")
        header = f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|"
        digest = hashlib.blake2b(header.encode(), digest_size=16)
        for values in block_values(tensor.detach()):
            digest.update(values.cpu().numpy().astype("<i8").tobytes())
        self._digests[name] = digest.digest()

    def hexdigest(self) -> str:
        """32 hexadecimal digits for everything added so far."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._digests):
            digest.update(self._digests[name])
        return digest.hexdigest()

    def tee(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes a weight stream on while adding every tensor of it.

        Args:
            stream: (Hugging Face name, tensor).

        Yields:
            The same pairs.
        """
        for name, tensor in stream:
            self.update(name, tensor)
            yield name, tensor


def block_values(tensor: Tensor) -> Iterator[Tensor]:
    """Weighted sums of a tensor's blocks, on its device (see `WeightChecksum`).

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
