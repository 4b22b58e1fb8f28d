"""The verifier of a configuration: one pool, a verifier per ability, or the user's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.interfaces import Verifier
from megatron_prime.verify.code.verifier import CodeVerifier, choose_isolation, code_worker_kind
from megatron_prime.verify.futures import verify
from megatron_prime.verify.math.verifier import MathVerifier, math_worker_kind
from megatron_prime.verify.plugin import GuardedVerifier, make_own_verifier
from megatron_prime.verify.pool import WorkerPool


class RoutingVerifier:
    """Gives each prompt to the verifier of its ability (`interfaces.Verifier`). Use as a context manager.

    Args:
        verifiers: by ability; one for ``*`` takes all that have none of their own.
        pool: closed with this verifier.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], pool: WorkerPool | None = None) -> None:
        self._verifiers = dict(verifiers)
        self._pool = pool

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """See `interfaces.Verifier.submit`.

        Raises:
            VerifierError: no verifier knows the prompt's ability.
        """
        verifier = self._verifiers.get(prompt.ability) or self._verifiers.get("*")
        if verifier is None:
            raise VerifierError(
                f"prompt {prompt.prompt_id}: no verifier for ability '{prompt.ability}' (there are: "
                f"{', '.join(self._verifiers)}); name it in data.abilities, or leave such rows out"
            )
        return verifier.submit(prompt, response)

    def verify(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        """One verdict per item, in the same order; see `protocol.verify`."""
        return verify(self, items)

    def close(self) -> None:
        """Ends all verifiers and their workers."""
        for verifier in self._verifiers.values():
            verifier.close()
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> RoutingVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_verifier(section: VerifierSection, abilities: Collection[str]) -> RoutingVerifier:
    """The verifier of a configuration.

    Args:
        section: the configuration.
        abilities: that will occur; what runs programs is only set up for ``code``.

    Raises:
        VerifierError: the user's own cannot be made, or programs cannot be run safely on this machine.
    """
    if section.factory is not None:
        return RoutingVerifier({"*": GuardedVerifier(make_own_verifier(section))})
    kinds = [math_worker_kind(section.timeout_seconds, section.memory_gib)]
    if "code" in abilities:
        kinds.append(code_worker_kind(section.code, choose_isolation(section.code)))
    pool = WorkerPool(kinds, section.num_workers, section.cache_size)
    verifiers: dict[str, Verifier] = {"math": MathVerifier(pool, section.timeout_seconds)}
    if "code" in abilities:
        verifiers["code"] = CodeVerifier(pool, section.code)
    return RoutingVerifier({ability: GuardedVerifier(verifier) for ability, verifier in verifiers.items()}, pool)
