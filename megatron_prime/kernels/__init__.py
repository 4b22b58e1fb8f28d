"""The fused linear log-prob op: hidden states in, log-probs (or a loss) out, never [tokens, vocabulary]."""

from megatron_prime.kernels.backends import choose_backend
from megatron_prime.kernels.contract import ChunkLoss, HeadOptions, LogprobResult, LossResult
from megatron_prime.kernels.gemm import choose_gemm
from megatron_prime.kernels.logprob import fused_linear_logprob
from megatron_prime.kernels.loss import fused_linear_logprob_loss

__all__ = [
    "ChunkLoss",
    "HeadOptions",
    "LogprobResult",
    "LossResult",
    "choose_backend",
    "choose_gemm",
    "fused_linear_logprob",
    "fused_linear_logprob_loss",
]
