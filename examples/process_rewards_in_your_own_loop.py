"""PRIME's advantages in a training loop of your own: the algorithm is plain functions on tensors.

Four answers to one prompt, log-probs of the PRM and the reference, outcomes from a verifier; out come
per-token advantages for any policy-gradient loss. Run it: python examples/process_rewards_in_your_own_loop.py
"""

from __future__ import annotations

import torch

from megatron_prime import AdvantageSection
from megatron_prime.algorithm import compute_advantages, implicit_rewards


def main() -> None:
    """Prints the advantages of a small made-up group."""
    torch.manual_seed(0)
    lengths = torch.tensor([6, 4, 5, 3])
    mask = torch.arange(6) < lengths[:, None]  # [responses, positions], right-padded
    outcomes = torch.tensor([1.0, 0.0, 1.0, 0.0])
    group_index = torch.zeros(4, dtype=torch.int64)  # all four answer the same prompt

    reference_logprobs = -torch.rand(4, 6) * mask
    # This PRM has learned that right answers are likelier than the reference thinks.
    prm_logprobs = reference_logprobs + 0.2 * (outcomes[:, None] - 0.5) * mask

    rewards = implicit_rewards(prm_logprobs, reference_logprobs, mask, beta=0.05)
    result = compute_advantages(outcomes, rewards, mask, group_index, AdvantageSection(estimator="rloo"))
    print("process rewards\n", rewards)
    print("advantages\n", result.advantages)
    print({name: round(value, 3) for name, value in result.metrics.items()})


if __name__ == "__main__":
    main()
