"""The fused linear log-prob op."""

from megatron_prime.kernels.logprob import LogprobResult, fused_linear_logprob

__all__ = ["LogprobResult", "fused_linear_logprob"]
