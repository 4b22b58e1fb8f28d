"""The types that a configuration can name; free of Megatron, so that engines can share them."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""`ModelSection.dtype` to torch's type."""
