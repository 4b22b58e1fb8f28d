"""A checksum of named weights that the trainer and an engine can compute independently and compare."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.digests import digest_on


class WeightChecksum:
    """Digest of a set of named tensors: what they hold, not how or in which order they arrived.

    Name, shape, dtype and `digest_on` of each tensor, sorted by name, go through BLAKE2b. Floating point is compared by
    its bits: 0.0 and -0.0 differ. It finds errors; it is no protection against an adversary.

    Args:
        device: where values are read. Both sides of a comparison name one of the same kind.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._entries: dict[str, bytes] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor.

        Args:
            name: its Hugging Face name.
            tensor: any shape, dtype, device and strides.

        Raises:
            WeightsError: the name was added before.
        """
        if name in self._entries:
            raise WeightsError(f"{name}: appears twice in one weight stream")
        entry = (name, tuple(tensor.shape), str(tensor.dtype), digest_on(self._device, tensor))
        self._entries[name] = repr(entry).encode()

    def hexdigest(self) -> str:
        """32 hexadecimal digits for everything added so far."""
        everything = b"".join(self._entries[name] for name in sorted(self._entries))
        return hashlib.blake2b(everything, digest_size=16).hexdigest()
