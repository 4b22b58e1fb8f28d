"""What `megatron-prime check` holds a user's own parts to, one file per kind of socket."""

from __future__ import annotations

from megatron_prime.config.schema import PrimeConfig


def check_sockets(config: PrimeConfig) -> list[str]:
    """Problems of all parts that are the user's own, each with its key; what is built in is not imported."""
    from megatron_prime.sockets import is_own

    sections = config.advantage, config.prm, config.policy
    own = [is_own("advantage.estimator", sections[0].estimator), is_own("prm.loss", sections[1].loss)]
    own += [is_own("advantage.process_source", sections[0].process_source), is_own("policy.loss", sections[2].loss)]
    if not any(own):
        return []
    from megatron_prime.assembly.contracts.algorithm import check_algorithm

    return check_algorithm(config)
