"""Files that come with the package: the demo's configurations and tokenizer, and the Slurm job script."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent
