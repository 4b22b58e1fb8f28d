"""What a well-typed configuration can still get wrong, found before any process group or GPU is touched.

Every check returns lines ``key: problem; fix``. All problems are reported together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from megatron_prime.config.engine_checks import check_engine
from megatron_prime.config.layout_checks import Architecture, check_layout, check_parallel, data_parallel_size
from megatron_prime.config.schema import (
    AdvantageSection,
    AnyConfig,
    ArithmeticData,
    FileData,
    ModelSection,
    OptimizerSection,
    OwnData,
    ParallelSection,
    PrimeConfig,
    SftConfig,
)
from megatron_prime.errors import ConfigError

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
ABILITIES = ("math", "code")
"""What there is a verifier for."""


def check_config(config: AnyConfig, architecture: Architecture | None = None, check_files: bool = True) -> list[str]:
    """Finds contradictions, arithmetic that does not work out and missing files.

    Args:
        config: a configuration from `load_config`.
        architecture: shape of the model, where it is known; adds the checks of the layout against it.
        check_files: look for the model folder and the data files on this machine.

    Returns:
        One line ``key: problem; fix`` per problem, empty where the configuration can run.
    """
    problems = _check_run_name(config.run.name)
    problems += _check_loggers(config.run.loggers)
    problems += _check_precision(config.model, config.parallel)
    problems += _check_micro_batch(config)
    problems += _check_data(config, check_files)
    if isinstance(config, PrimeConfig):
        problems += _check_start(config)
        problems += _check_effect(config.advantage)
    if check_files:
        problems += _check_folders(config)
    problems += check_parallel(config.parallel)
    if isinstance(config, SftConfig):
        problems += _check_sft(config)
    else:
        problems += _check_rollout(config)
        problems += check_engine(config, architecture, check_files)
        problems += _check_updates(config)
    if architecture is not None:
        problems += check_architecture(config, architecture)
    return problems


def raise_for_problems(problems: Sequence[str]) -> None:
    """Raises one `ConfigError` with all problems, if there are any."""
    if problems:
        raise ConfigError(problems)


def _check_run_name(name: str) -> list[str]:
    # A pure path has dropped its dots; one of them alone would be run.directory itself.
    if not name.strip() or PurePath(name).is_absolute() or {".", ".."} & set(name.split("/")):
        return [f"run.name: {name!r} is no folder below run.directory; use a plain name such as my-run"]
    return []


def _check_loggers(names: Sequence[str]) -> list[str]:
    twice = {name for name in names if names.count(name) > 1}
    return [f"run.loggers: {name!r} is named more than once; name it once" for name in sorted(twice)]


def _check_precision(model: ModelSection, parallel: ParallelSection) -> list[str]:
    problems = []
    engine = model.transformer_impl == "transformer_engine"
    if engine and model.dtype != "bfloat16" and parallel.context_parallel_size > 1:
        problems.append(
            "model.transformer_impl: Transformer Engine has no context-parallel attention in float32; set "
            "model.dtype=bfloat16 or model.transformer_impl=auto"
        )
    if model.fp8 is None:
        return problems
    if model.dtype != "bfloat16":
        problems.append(f"model.fp8: {model.fp8!r} needs model.dtype=bfloat16; set it, or model.fp8 to null")
    if model.transformer_impl == "local":
        problems.append(
            f"model.fp8: {model.fp8!r} needs Transformer Engine; set model.transformer_impl=auto or model.fp8=null"
        )
    return problems


def _check_micro_batch(config: AnyConfig) -> list[str]:
    micro_batch = config.micro_batch
    if micro_batch.micro_batch_size is not None and micro_batch.micro_batch_tokens is not None:
        return [
            "micro_batch.micro_batch_size: micro_batch.micro_batch_tokens is set too"
            "; set exactly one and the other to null"
        ]
    if micro_batch.micro_batch_size is None and micro_batch.micro_batch_tokens is None:
        return ["micro_batch.micro_batch_tokens: neither it nor micro_batch.micro_batch_size is set; set exactly one"]
    return []


def _check_data(config: AnyConfig, check_files: bool) -> list[str]:
    data = config.data
    if isinstance(data, ArithmeticData):
        if data.min_operations > data.max_operations:
            return [
                f"data.min_operations: {data.min_operations} is above data.max_operations = {data.max_operations}"
                "; lower it"
            ]
        return []
    factory = config.verifier.factory if isinstance(config, PrimeConfig) else None
    problems = _check_abilities(data, factory)
    if isinstance(data, OwnData):
        return problems
    if not data.train:
        problems.append("data.train: no files; name at least one")
    if isinstance(config, PrimeConfig) and config.evaluation.num_prompts and not data.evaluation:
        problems.append(
            f"data.evaluation: no files, and evaluation.num_prompts is {config.evaluation.num_prompts}"
            "; name held-out files or set evaluation.num_prompts=0"
        )
    for key, sources in (("data.train", data.train), ("data.evaluation", data.evaluation)):
        for source in sources:
            problems += _check_source(key, source, check_files)
    return problems


def _check_abilities(data: FileData | OwnData, factory: str | None) -> list[str]:
    if not data.abilities:
        return [f"data.abilities: none, which leaves no prompt; name some of {', '.join(ABILITIES)}"]
    return [
        f"data.abilities: {ability!r} has no verifier; use only {', '.join(ABILITIES)}, or name your own verifier as"
        " verifier.factory"
        for ability in data.abilities
        if ability not in ABILITIES and factory is None
    ]


def _check_source(key: str, source: str, check_files: bool) -> list[str]:
    if source.startswith("hf:"):
        parts = source.split(":")[1:]
        well_formed = len(parts) in (2, 3) and all(parts)
        return (
            [] if well_formed else [f"{key}: {source!r} is not a dataset; write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"]
        )
    if not source.endswith(DATA_SUFFIXES):
        return [f"{key}: {source!r} has an unknown format; use {', '.join(DATA_SUFFIXES)} or hf:NAME:SPLIT"]
    if check_files and not Path(source).is_file():
        return [f"{key}: no such file: {source}; correct the path or fetch the file"]
    return []


def _check_folders(config: AnyConfig) -> list[str]:
    needs_weights = config.model.init == "weights"
    if isinstance(config, SftConfig):
        advice = "fetch the weights or set model.init=random"
        return _check_model_folder("model.path", config.model.path, needs_weights, advice)
    problems = _check_model_folder("model.path", config.model.path, needs_weights, "fetch the weights")
    others = {"prm.path": config.prm.path if config.uses_prm else None, "reference.path": config.reference.path}
    for key, path in others.items():
        if path is not None:
            problems += _check_model_folder(key, path, True, "fetch the weights")
    return problems


def _check_model_folder(key: str, path: str, needs_weights: bool, advice: str) -> list[str]:
    folder = Path(path)
    if not folder.is_dir():
        return [f"{key}: no such folder: {path}; give a local Hugging Face folder"]
    if not (folder / "config.json").is_file():
        return [f"{key}: {path} has no config.json; give a Hugging Face model folder"]
    if needs_weights and not any(folder.glob("*.safetensors")):
        return [f"{key}: {path} has no *.safetensors; {advice}"]
    return []


def _check_rollout(config: PrimeConfig) -> list[str]:
    rollout, keep = config.rollout, config.filter
    problems = []
    if keep.min_accuracy > keep.max_accuracy:
        problems.append(
            f"filter.min_accuracy: {keep.min_accuracy} is above filter.max_accuracy = {keep.max_accuracy}; lower it"
        )
    elif keep.enabled and not any(
        keep.min_accuracy <= correct / rollout.num_responses <= keep.max_accuracy
        for correct in range(rollout.num_responses + 1)
    ):
        problems.append(
            f"filter.min_accuracy: no count of right answers out of rollout.num_responses = {rollout.num_responses}"
            f" lies in [{keep.min_accuracy}, {keep.max_accuracy}]; widen the range or sample more answers"
        )
    if config.advantage.outcome_coef == 0 and config.advantage.process_coef == 0:
        problems.append("advantage.outcome_coef: both coefficients are 0; give outcomes or process rewards a weight")
    return problems


def _check_effect(section: AdvantageSection) -> list[str]:
    """Settings that differ from their default and would change nothing."""
    default = AdvantageSection()
    problems = []
    if section.estimator != "rloo" and section.process_baseline != default.process_baseline:
        problems.append(
            f"advantage.process_baseline: belongs to rloo and advantage.estimator is {section.estimator}; leave it out"
        )
    if section.process_gate == "none" and section.gate_smoothing != default.gate_smoothing:
        problems.append("advantage.gate_smoothing: has no effect while advantage.process_gate is none; leave it out")
    return problems


def _check_start(config: PrimeConfig) -> list[str]:
    """Policy, PRM and reference must mean the same by a log-probability."""
    problems = []
    if config.model.init == "random":
        problems.append(
            "model.init: random would start policy, PRM and reference from different weights"
            "; make a start with `megatron-prime sft` and give its hf/ folder as model.path"
        )
    if config.reference.path is not None and config.reference.source == "policy":
        problems.append("reference.path: has no effect while reference.source is policy; leave one of them out")
    if config.reference.path is not None and config.policy.kl_coef != 0:
        problems.append(
            "policy.kl_coef: would pull the policy towards reference.path, which is the PRM's reference"
            "; set policy.kl_coef=0 or leave reference.path out"
        )
    if config.policy.kl_coef != 0 and config.rollout.temperature != 1:
        problems.append(
            f"policy.kl_coef: compares the policy at rollout.temperature = {config.rollout.temperature} with the"
            " reference, which has none; set rollout.temperature=1 or policy.kl_coef=0"
        )
    return problems


def _check_updates(config: PrimeConfig) -> list[str]:
    num_groups = config.rollout.num_prompts
    num_updates = max(config.run.num_steps - config.prm.warmup_steps, 0) if config.uses_prm else config.run.num_steps
    num_policy_steps = num_updates * config.policy.num_epochs * config.policy.num_minibatches
    problems = _check_minibatches("policy.num_minibatches", num_groups, config.policy.num_minibatches, config.parallel)
    problems += _check_optimizer("policy.optimizer", config.policy.optimizer, num_policy_steps)
    if not config.uses_prm:
        return problems
    if config.prm.warmup_steps >= config.run.num_steps:
        problems.append(
            f"prm.warmup_steps: {config.prm.warmup_steps} of run.num_steps = {config.run.num_steps} steps"
            " leave none for the policy; lower it"
        )
    problems += _check_minibatches("prm.num_minibatches", num_groups, config.prm.num_minibatches, config.parallel)
    num_prm_steps = config.run.num_steps * config.prm.num_minibatches * config.prm.num_window_batches
    return problems + _check_optimizer("prm.optimizer", config.prm.optimizer, num_prm_steps)


def _check_minibatches(key: str, num_groups: int, num_minibatches: int, parallel: ParallelSection) -> list[str]:
    """Mini-batches are made of whole groups, and every replica needs a share of each."""
    needed = num_minibatches * data_parallel_size(parallel)
    if needed <= num_groups:
        return []
    return [
        f"{key}: {num_minibatches} mini-batches for {data_parallel_size(parallel)} data-parallel replicas need"
        f" {needed} groups and rollout.num_prompts is {num_groups}; use fewer mini-batches or more prompts"
    ]


def _check_optimizer(key: str, optimizer: OptimizerSection, num_steps: int) -> list[str]:
    problems = []
    if optimizer.min_lr > optimizer.lr:
        problems.append(f"{key}.min_lr: {optimizer.min_lr} is above {key}.lr = {optimizer.lr}; lower it")
    elif optimizer.min_lr > 0 and optimizer.lr_decay_style == "constant":
        problems.append(
            f"{key}.min_lr: has no effect on a constant learning rate; set it to 0 or {key}.lr_decay_style=cosine"
        )
    if optimizer.lr_warmup_steps > num_steps:
        problems.append(
            f"{key}.lr_warmup_steps: {optimizer.lr_warmup_steps} is above the run's {num_steps} optimizer steps"
            "; lower it"
        )
    return problems


def _check_sft(config: SftConfig) -> list[str]:
    problems = _check_optimizer("sft.optimizer", config.sft.optimizer, config.run.num_steps)
    num_replicas = data_parallel_size(config.parallel)
    if config.sft.batch_size < num_replicas:
        problems.append(
            f"sft.batch_size: {config.sft.batch_size} is less than the data parallel size {num_replicas}"
            f"; use {num_replicas} or more"
        )
    return problems


def check_architecture(config: AnyConfig, architecture: Architecture) -> list[str]:
    """Whether a model of this shape can be cut and fed as configured; lines as those of `check_config`."""
    problems = check_layout(config.parallel, architecture)
    if isinstance(config, PrimeConfig):
        problems += [
            f"rollout.stop_token_ids: {token} is outside the model's vocabulary of {architecture.vocab_size} tokens"
            "; no answer would ever end with it"
            for token in config.rollout.stop_token_ids
            if token >= architecture.vocab_size
        ]
    return problems + _check_length(config, architecture.max_position_embeddings)


def _check_length(config: AnyConfig, max_position_embeddings: int) -> list[str]:
    data = config.data
    prompt = 0 if isinstance(data, ArithmeticData) else data.max_prompt_tokens
    if isinstance(config, PrimeConfig):
        key, response = "rollout.max_response_tokens", config.rollout.max_response_tokens
    elif isinstance(data, FileData):
        key, response = "data.max_response_tokens", data.max_response_tokens
    else:
        return []
    if prompt + response <= max_position_embeddings:
        return []
    return [
        f"{key}: {prompt} prompt + {response} response tokens are above the model's {max_position_embeddings} positions"
        "; lower it or data.max_prompt_tokens"
    ]
