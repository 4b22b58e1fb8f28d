"""Everything that can be known to be wrong before a process group or a model exists."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prime.assembly.contracts import check_imports, check_sockets
from megatron_prime.checkpoint.manifest import committed
from megatron_prime.config.checks import check_architecture, check_config, raise_for_problems
from megatron_prime.config.schema import AnyConfig, FileData, PrimeConfig, SftConfig
from megatron_prime.errors import CheckpointError, ConfigError, DataError, VerifierError, WeightsError
from megatron_prime.launch.local import is_launched
from megatron_prime.planner.footprint import LayoutSizes, checkpoint_bytes, exported_bytes, num_checkpoints
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture

if TYPE_CHECKING:
    from megatron_prime.interfaces import PromptSource, SftSource

MAX_TESTS_READ = 5000
MAX_TESTS_RUN = 64
"""Problems with programs whose tests are looked at, and tried out, before a run; `prepare` does both for all rows."""
_log = logging.getLogger(__name__)


def check(config: AnyConfig, *, check_files: bool = True) -> ModelArchitecture:
    """Checks a configuration and reads the shape of its model.

    Args:
        config: from `load_config`.
        check_files: look at weights, tokenizer and data files and try parts of the user's own too; without them only
            the model's config.json is read.

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
        # Parts are tried once: by the process that starts the ranks, where there is one.
        raise_for_problems(check_imports(config) if is_launched() else check_sockets(config))
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
    _check_tests(config, prompts)
    return prompts


def _truths(config: PrimeConfig, prompts: PromptSource, count: int) -> Mapping[str, str]:
    """Tests of some problems with programs, by where they stand; none where a verifier of the user's own reads them."""
    from megatron_prime.data.files import FilePrompts

    if config.verifier.factory is not None or not isinstance(prompts, FilePrompts):
        return {}
    return prompts.ground_truths("code", count)


def _check_tests(config: PrimeConfig, prompts: PromptSource) -> None:
    """Warns of tests that cannot be read, which would give no verdict to any answer.

    Raises:
        DataError: none can be read.
    """
    from megatron_prime.verify.code.bad_tests import told, what_is_wrong

    truths = _truths(config, prompts, MAX_TESTS_READ)
    found = {where: reason for where, truth in truths.items() if (reason := what_is_wrong(truth)) is not None}
    if not found:
        return
    what = f"data.train: {told(found, len(truths))}; megatron-prime prepare leaves such rows out"
    if len(found) == len(truths):
        raise DataError(what)
    _log.warning("%s", what)


def check_programs(config: PrimeConfig, prompts: PromptSource) -> None:
    """Warns of tests that programs pass which do nothing; runs such programs on some problems.

    Raises:
        DataError: all of those problems have such tests.
    """
    from megatron_prime.verify.code.bad_tests import find_bad_tests, told
    from megatron_prime.verify.routing import build_verifier

    truths = _truths(config, prompts, MAX_TESTS_RUN)
    if not truths:
        return
    try:
        with build_verifier(config.verifier, ["code"]) as verifier:
            found = find_bad_tests(verifier, truths)
    except VerifierError as error:
        _log.warning("data.train: no tests were tried out, as this machine cannot run programs safely: %s", error)
        return
    if found:
        what = f"data.train: {told(found, len(truths))}; megatron-prime prepare leaves such rows out"
        if len(found) == len(truths):
            raise DataError(what)
        _log.warning("%s", what)


def read_examples(config: SftConfig) -> SftSource:
    """Reads all rows of a supervised run; errors as in `read_prompts`."""
    from megatron_prime.data.sources import build_sft_source
    from megatron_prime.data.tokenizer import load_tokenizer

    return build_sft_source(config.data, load_tokenizer(config.model.path), seed=config.run.seed)


def _check_files(config: AnyConfig, architecture: ModelArchitecture) -> None:
    # Seconds of imports, which a plan from shapes alone does without.
    from megatron_prime.data.templates import render
    from megatron_prime.data.tokenizer import end_token_ids, load_tokenizer
    from megatron_prime.weights.hf_folder import HfFolder

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
