"""Imported once by the process whose forks are the processes of `GlooPool`."""

import gc

import torch

from megatron_prime.assembly import run as build

torch.set_num_threads(1)
build.import_megatron()
# What is imported stays: no collection of a fork looks at it again.
gc.freeze()
