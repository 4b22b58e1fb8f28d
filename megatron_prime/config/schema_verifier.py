"""The `verifier` section of a configuration; see `schema`."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from megatron_prime.config.section import Count, CountOrZero, Named, Positive, Section


@dataclass(kw_only=True, slots=True)
class CodeVerifierSection(Section):
    """Programs against unit tests (docs/reference/verifiers.md)."""

    isolation: Literal["auto", "fork_server", "bubblewrap", "rlimits_unsafe"] = "auto"
    """`auto`: the best safe one that the machine offers, tried out at the start. `rlimits_unsafe` lets programs see
    the machine's files and is never chosen by itself."""
    mode: Literal["all_or_nothing", "fraction_all", "prime_fraction"] = "all_or_nothing"
    """Reward: 1 where every test passes; the share of all tests; or the released PRIME code's, of the first 10."""
    test_seconds: Positive = 5.0
    """CPU time of one test; it may last twice as long by the clock on the wall."""
    total_seconds: Positive = 30.0
    """Wall-clock time of all tests of one program; the tests left then have failed."""
    memory_gib: Positive = 1.0
    """Address space of a program."""


@dataclass(kw_only=True, slots=True)
class VerifierSection(Section):
    """Outcome labels, of math answers and of code by each prompt's ability."""

    factory: Annotated[str, Named("verifier.factory")] | None = None
    """`package.module:function` that makes your own verifier for all abilities, given this section."""
    num_workers: Count = 1
    """Processes per rank that compare answers and run programs at the same time."""
    timeout_seconds: Positive = 1.5
    """Math: a comparison that takes longer is killed; the response is missing."""
    memory_gib: Positive = 2.0
    """Math: address space of a process that compares."""
    cache_size: CountOrZero = 100_000
    """Verdicts that each rank remembers, by answer, tests and limits; 0 for none."""
    code: CodeVerifierSection = field(default_factory=CodeVerifierSection)
