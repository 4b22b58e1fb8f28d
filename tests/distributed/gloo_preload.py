"""Imported once by the process whose forks are the processes of `GlooPool`."""

import torch

from megatron_prime import build

torch.set_num_threads(1)
build.import_megatron()
