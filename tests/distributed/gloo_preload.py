"""Imported once by the process whose forks are the processes of `GlooPool`."""

import gc

import torch

import megatron_prime.assembly.run
from megatron_prime.mcore.cpu import megatron_platform

torch.set_num_threads(1)
with megatron_platform():
    import megatron_prime.mcore.libraries
    import megatron_prime.mcore.model
    import megatron_prime.mcore.optimizer  # noqa: F401
# What is imported stays: no collection of a fork looks at it again.
gc.freeze()
