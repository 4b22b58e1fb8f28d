"""What of a run is saved, and how."""

from pydantic.dataclasses import dataclass

from megatron_prime.config.section import Count, CountOrZero, Section


@dataclass(kw_only=True, slots=True)
class CheckpointSection(Section):
    """What is kept."""

    every_steps: CountOrZero = 10
    """0: only at the end."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy of all states in host memory; the last one of a run
    is written without."""
    keep_last: Count = 2
    """The latest that are kept."""
    keep_best: Count | None = 1
    """Those with the highest evaluation accuracy that are kept besides (of equals the later one); null: none."""
    export_every_saves: CountOrZero = 0
    """Every so many checkpoints the models are also exported as Hugging Face folders below `exports/` of the run;
    0: never."""
    export_hf: bool = True
    """Write the final policy (PRIME: and PRM) as Hugging Face folders `hf/` and `hf_prm/` of the run."""
