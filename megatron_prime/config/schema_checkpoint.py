"""What of a run is saved, and how."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointSection:
    """What is kept."""

    every_steps: int = 10
    """0: only at the end."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy of all states in host memory; the last one of a run
    is written without."""
    keep_last: int = 2
    """The latest that are kept."""
    keep_best: int | None = 1
    """Those with the highest evaluation accuracy that are kept besides (of equals the later one); null: none."""
    export_every_saves: int = 0
    """Every so many checkpoints the models are also exported as Hugging Face folders below `exports/` of the run;
    0: never."""
    export_hf: bool = True
    """Write the final policy (PRIME: and PRM) as Hugging Face folders `hf/` and `hf_prm/` of the run."""
