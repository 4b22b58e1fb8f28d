"""`megatron-prime convert`: Hugging Face folders to Megatron checkpoints and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prime.commands.arguments import Commands, add_command, at_least_one
from megatron_prime.errors import ConfigError

if TYPE_CHECKING:
    from megatron_prime.weights.conversion_plan import Cut

_MAX_FILES = 12


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "convert", "Hugging Face folder <-> Megatron distributed checkpoint", run)
    parser.add_argument("direction", choices=["to-megatron", "to-hf"])
    parser.add_argument("source", type=Path, help="Hugging Face folder, or Megatron checkpoint")
    parser.add_argument("target", type=Path, help="new folder; appears when it is complete")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the source is stored")
    text = "to-hf: Hugging Face folder with config.json and tokenizer (default: kept copy)"
    parser.add_argument("--like", type=Path, help=text)
    text = "to-megatron: cut files for this layout (default: 1); any other can read them too"
    parser.add_argument("--tensor-model-parallel-size", type=at_least_one, default=1, help=text)
    parser.add_argument("--pipeline-model-parallel-size", type=at_least_one, default=1, help="the same")
    text = "read everything back and compare every bit, and log-probs of a few prompts with transformers'"
    parser.add_argument("--verify", action="store_true", help=text)
    text = "print files and peak memory; needs no weights, only config.json of the source (to-hf: of --like)"
    parser.add_argument("--dry-run", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    from megatron_prime.mcore.dtypes import DTYPES
    from megatron_prime.weights.conversion import to_hf, to_megatron
    from megatron_prime.weights.conversion_plan import Cut

    source, target, is_to_megatron = options.source, options.target, options.direction == "to-megatron"
    cut = Cut(tp_size=options.tensor_model_parallel_size, pp_size=options.pipeline_model_parallel_size)
    if not is_to_megatron and cut != Cut():
        raise ConfigError("--tensor-model-parallel-size, --pipeline-model-parallel-size: only for to-megatron")
    if options.dry_run:
        print("\n".join(_plan_lines(options, cut)))
        return 0
    dtype = DTYPES[options.dtype] if options.dtype else None
    lines = []
    with _progress_bars() as show:
        if is_to_megatron:
            to_megatron(source, target, dtype=dtype, cut=cut, progress=partial(show, "converted"))
        else:
            to_hf(source, target, like=options.like, dtype=dtype, progress=partial(show, "converted"))
        if options.verify:
            from megatron_prime.assembly.verify_conversion import verify_bits, verify_logprobs

            hf, megatron = (source, target) if is_to_megatron else (target, source)
            lines = [verify_bits(hf, megatron, partial(show, "compared")), verify_logprobs(hf, megatron)]
    print("\n".join([*lines, f"wrote {target}"]))
    return 0


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Shows bars on a terminal; yields what is told a stage, its bytes done and its bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _plan_lines(options: argparse.Namespace, cut: Cut) -> list[str]:
    """What would be written and the memory that it would take, from config.json alone."""
    import torch

    from megatron_prime.mcore.dtypes import DTYPES
    from megatron_prime.weights.architecture import read_architecture
    from megatron_prime.weights.conversion import side_folder
    from megatron_prime.weights.conversion_plan import plan_conversion

    is_to_megatron = options.direction == "to-megatron"
    architecture = read_architecture(options.source if is_to_megatron else side_folder(options.source, options.like))
    written = str(architecture.hf_config.get("dtype") or architecture.hf_config.get("torch_dtype"))
    stored = DTYPES.get(written, torch.float32)
    dtype = DTYPES[options.dtype] if options.dtype else stored
    plan = plan_conversion(architecture, megatron=is_to_megatron, stored=stored, dtype=dtype, cut=cut)
    files = [f"  {name:<36} {size / 1e9:9.3f} GB" for name, size in plan.files.items()]
    hidden = len(files) - _MAX_FILES
    if hidden > 0:
        files[_MAX_FILES - 1 : -1] = [f"  ... {hidden + 1} more"]
    return [
        f"{plan.num_tensors} tensors, {plan.num_bytes / 1e9:.3f} GB in {len(plan.files)} files ({options.target}):",
        *files,
        f"largest tensor  {plan.largest}, {plan.largest_bytes / 1e9:.3f} GB",
        f"peak memory     {plan.peak_bytes / 1e9:.3f} GB at most, beside 0.5 GB of libraries",
    ]
