"""What holds for every test process."""

import os

import torch

if not torch.cuda.is_available():
    # Triton asks when it is first imported; its interpreter is all that a CPU can run of it.
    os.environ["TRITON_INTERPRET"] = "1"
