"""The verifier of a configuration: one pool, a verifier per ability, or the user's own."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import cast

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.code.verifier import CodeVerifier, choose_isolation, code_worker_kind
from megatron_prime.verify.math_verifier import MathVerifier, math_worker_kind
from megatron_prime.verify.pool import WorkerPool
from megatron_prime.verify.protocol import Verifier, verify


class RoutingVerifier:
    """Gives each prompt to the verifier of its ability (`protocol.Verifier`). Use as a context manager.

    Args:
        verifiers: by ability; one for ``*`` takes all that have none of their own.
        pool: closed with this verifier.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], pool: WorkerPool | None = None) -> None:
        self._verifiers = dict(verifiers)
        self._pool = pool
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each status was given since the start."""
        with self._lock:
            return dict(self._counts)

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """See `protocol.Verifier.submit`.

        Raises:
            VerifierError: no verifier knows the prompt's ability.
        """
        verifier = self._verifiers.get(prompt.ability) or self._verifiers.get("*")
        if verifier is None:
            raise VerifierError(
                f"prompt {prompt.prompt_id}: no verifier for ability '{prompt.ability}' (there are: "
                f"{', '.join(self._verifiers)}); name it in data.abilities, or leave such rows out"
            )
        future = verifier.submit(prompt, response)
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Future[Verdict]) -> None:
        if not future.cancelled() and future.exception() is None:
            with self._lock:
                self._counts[future.result().status] += 1

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
        return RoutingVerifier({"*": _own_verifier(section)})
    kinds = [math_worker_kind(section.timeout_seconds, section.memory_gib)]
    if "code" in abilities:
        kinds.append(code_worker_kind(section.code, choose_isolation(section.code)))
    pool = WorkerPool(kinds, section.num_workers, section.cache_size)
    verifiers: dict[str, Verifier] = {"math": MathVerifier(pool, section.timeout_seconds)}
    if "code" in abilities:
        verifiers["code"] = CodeVerifier(pool, section.code)
    return RoutingVerifier(verifiers, pool)


def _own_verifier(section: VerifierSection) -> Verifier:
    module_name, colon, function_name = str(section.factory).partition(":")
    if not colon:
        raise VerifierError(f"verifier.factory: {section.factory!r} must be package.module:function")
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise VerifierError(f"verifier.factory: {section.factory!r} cannot be imported: {error}") from error
    verifier = factory(section)
    missing = [name for name in ("submit", "close") if not callable(getattr(verifier, name, None))]
    if missing:
        raise VerifierError(f"verifier.factory: what {section.factory} returned has no {' and no '.join(missing)}")
    return cast(Verifier, verifier)
