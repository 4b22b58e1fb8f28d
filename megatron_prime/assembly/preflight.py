"""Everything that can be known to be wrong before a process group or a model exists."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prime.checkpoint.manifest import committed
from megatron_prime.config.checks import check_architecture, check_config, raise_for_problems
from megatron_prime.config.schema import AnyConfig, FileData, PrimeConfig, SftConfig
from megatron_prime.errors import CheckpointError, ConfigError, WeightsError
from megatron_prime.planner.footprint import LayoutSizes, checkpoint_bytes, exported_bytes, num_checkpoints
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture

if TYPE_CHECKING:
    from megatron_prime.interfaces import PromptSource, SftSource


def check(config: AnyConfig, *, check_files: bool = True) -> ModelArchitecture:
    """Checks a configuration and reads the shape of its model.

    Args:
        config: from `load_config`.
        check_files: look at weights, tokenizer and data files too; without them only the model's config.json is read.

    Raises:
        ConfigError, WeightsError, DataError: with all problems found.
    """
    problems = check_config(config, check_files=check_files)
    if any(p.startswith("model.path") for p in problems):
        raise_for_problems(problems)
    try:
        architecture = read_architecture(config.model.path)
    except WeightsError as error:
        raise ConfigError([*problems, f"model.path: {error}"]) from error
    raise_for_problems(check_config(config, architecture, check_files))
    if check_files:
        _check_files(config, architecture)
    return architecture


def read_prompts(config: PrimeConfig) -> PromptSource:
    """Reads all rows of a PRIME run.

    Raises:
        DataError: a row that cannot be used, or none that is left.
    """
    from megatron_prime.data.sources import build_prompt_source
    from megatron_prime.data.tokenizer import load_tokenizer

    prompts = build_prompt_source(config.data, load_tokenizer(config.model.path), seed=config.run.seed)
    if config.evaluation.num_prompts > 0:
        prompts.evaluation(1)
    return prompts


def read_examples(config: SftConfig) -> SftSource:
    """Reads all rows of a supervised run; errors as in `read_prompts`."""
    from megatron_prime.data.sources import build_sft_source
    from megatron_prime.data.tokenizer import load_tokenizer

    return build_sft_source(config.data, load_tokenizer(config.model.path), seed=config.run.seed)


def _check_files(config: AnyConfig, architecture: ModelArchitecture) -> None:
    # Seconds of imports, which a plan from shapes alone does without.
    from megatron_prime.data.templates import render
    from megatron_prime.data.tokenizer import end_token_ids, load_tokenizer
    from megatron_prime.verify.plugin import find_factory
    from megatron_prime.weights.hf_folder import HfFolder

    if isinstance(config, PrimeConfig) and config.verifier.factory is not None:
        find_factory(config.verifier)
    tokenizer = load_tokenizer(config.model.path)
    end_token_ids(tokenizer, config.model.path)
    if isinstance(config.data, FileData) and config.data.template == "chat":
        render(tokenizer, [{"role": "user", "content": "?"}], "chat")
    if config.model.init == "weights":
        HfFolder(config.model.path).validate(architecture)
    if isinstance(config, PrimeConfig):
        vocabulary = tokenizer.get_vocab()
        if config.uses_prm and config.prm.path is not None:
            found = _check_other_model("prm.path", config.prm.path, config, vocabulary)
            if found != architecture and config.reference.source == "sft" and config.reference.path is None:
                raise ConfigError(
                    f"reference.path: missing; prm.path {config.prm.path} has another shape than model.path, so its "
                    "reference cannot be the policy's start; name the model that the PRM started from"
                )
        if config.reference.path is not None:
            _check_other_model("reference.path", config.reference.path, config, vocabulary)


def _check_other_model(key: str, path: str, config: PrimeConfig, vocabulary: Mapping[str, int]) -> ModelArchitecture:
    """A model beside the policy: of any shape that fits the layout, with weights and the same tokens."""
    from megatron_prime.data.tokenizer import load_tokenizer
    from megatron_prime.weights.hf_folder import HfFolder

    architecture = read_architecture(path)
    raise_for_problems([f"{problem} ({key} {path})" for problem in check_architecture(config, architecture)])
    HfFolder(path).validate(architecture)
    if load_tokenizer(path).get_vocab() != vocabulary:
        raise ConfigError(
            f"{key}: {path} has another tokenizer than model.path {config.model.path}; token by token log-probs cannot "
            "be compared; use a model of the same family"
        )
    if max(vocabulary.values()) >= architecture.vocab_size:
        raise ConfigError(
            f"{key}: {path} has {architecture.vocab_size} rows for tokens up to {max(vocabulary.values())}; use another"
        )
    return architecture


def check_disk(config: AnyConfig, architecture: ModelArchitecture) -> None:
    """Looks whether the run's folder can be written and has room for what the run will leave; makes the folder.

    Raises:
        CheckpointError: it cannot or has not.
    """
    folder = Path(config.run.directory) / config.run.name / "checkpoints"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"run.directory: {folder} cannot be written: {error.strerror}; choose another, or change its rights"
        ) from error
    layout = LayoutSizes.of(config, on_cpu=False)
    size = checkpoint_bytes(config, architecture, layout)
    num_missing = max(1, num_checkpoints(config) - len(committed(folder)))
    needed = num_missing * size + exported_bytes(config, architecture, layout)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"run.directory: {folder} has {free / 1e9:.3g} GB free; {num_missing} more checkpoints of {size / 1e9:.3g}"
            f" GB and the exported models need {needed / 1e9:.3g} GB; free space, choose another run.directory, or"
            " lower checkpoint.keep_last, checkpoint.keep_best or checkpoint.export_every_saves"
        )
