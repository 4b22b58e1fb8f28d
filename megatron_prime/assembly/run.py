"""The one place that knows every concrete class: from a checked configuration to a finished run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prime import collectives
from megatron_prime.assembly.engines import running_engine
from megatron_prime.assembly.preflight import check, check_disk, read_examples, read_prompts
from megatron_prime.checkpoint.manifest import step_of
from megatron_prime.config.schema import AnyConfig, PrimeConfig, SftConfig
from megatron_prime.data.sources import PromptSource
from megatron_prime.errors import CheckpointError, ConfigError
from megatron_prime.kernels import HeadOptions, choose_backend, choose_gemm
from megatron_prime.mcore.checkpoint.checkpointer import Checkpointer
from megatron_prime.mcore.checkpoint.resume import find_checkpoint, identity_of
from megatron_prime.mcore.cpu import megatron_platform
from megatron_prime.mcore.dtypes import DTYPES
from megatron_prime.mcore.export import export_hf
from megatron_prime.mcore.parallel import Layout, parallel_layout
from megatron_prime.mcore.prime_roles import PolicyRole, PrmRole, ReferenceRole, SftRole
from megatron_prime.mcore.residency import awake
from megatron_prime.mcore.role import RoleSetup, TrainableRole
from megatron_prime.observe.failed_updates import FailedUpdateFiles
from megatron_prime.observe.loggers import GuardedLoggers
from megatron_prime.observe.metrics import RunLog
from megatron_prime.observe.report import draw_plots, write_summary
from megatron_prime.observe.run_folder import RunFolder, commit
from megatron_prime.trainer.prime import PrimeParts, PrimeTrainer
from megatron_prime.trainer.sft import SftTrainer
from megatron_prime.verify.routing import RoutingVerifier, build_verifier
from megatron_prime.watch.crash_report import crash_report
from megatron_prime.watch.interrupt import stop_requests
from megatron_prime.watch.rank_status import RANKS_FOLDER
from megatron_prime.watch.watchdog import Watchdog
from megatron_prime.weights.architecture import ModelArchitecture, read_architecture
from megatron_prime.weights.hf_folder import HfFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Process:
    """How this rank hears of requests and tells of itself."""

    should_stop: Callable[[], bool]
    watchdog: Watchdog
    crash_report: Callable[[], AbstractContextManager[None]]


def run(config: AnyConfig, *, ends_process: bool = False) -> Mapping[str, Any]:
    """Runs a configuration in the started processes.

    Args:
        config: the configuration.
        ends_process: a rank that fails in an unforeseen way ends its process, before anything is closed.

    Returns:
        The summary, which is also in the run folder.
    """
    architecture = check(config)
    torch.set_num_threads(config.run.num_threads)
    ranks_folder = RunFolder(config.run.directory, config.run.name).path / RANKS_FOLDER
    with parallel_layout(config.parallel, config.run.seed) as layout, stop_requests() as should_stop:
        _check_disk(config, architecture)
        watchdog = Watchdog(
            ranks_folder,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
            timeout_seconds=config.parallel.timeout_seconds,
        )
        report = partial(crash_report, watchdog, ends_process=ends_process)
        process = _Process(should_stop=should_stop, watchdog=watchdog, crash_report=report)
        with watchdog.watching(), report():
            if isinstance(config, PrimeConfig):
                return _run_prime(config, architecture, layout, process)
            return _run_sft(config, architecture, layout, process)


def _run_prime(
    config: PrimeConfig, architecture: ModelArchitecture, layout: Layout, process: _Process
) -> Mapping[str, Any]:
    if config.parallel.offload_idle == "all" and layout.device.type == "cpu":
        raise ConfigError("parallel.offload_idle: all moves models off a GPU, and there is none; use gradients or none")
    process.watchdog.enter("data", 0)
    # Before anything large: wrong rows show at once.
    prompts = configured_prompts(config)
    process.watchdog.enter("start", 0)
    starts = {"policy": config.model.path}
    if config.uses_prm:
        starts["prm"] = config.prm.path or config.model.path
    folder, resume_from = _run_folder(config, starts)
    setup = role_setup(config, architecture, layout, folder)
    num_warmup_steps = config.prm.warmup_steps if config.uses_prm else 0
    policy = PolicyRole(
        _setup_of(setup, config.policy.micro_batch_tokens),
        config.policy,
        num_steps=config.run.num_steps - num_warmup_steps,
    )
    roles: dict[str, TrainableRole] = {"policy": policy}
    # Each sleeps before the next one is built: an accelerator may have no room for all.
    policy.load_hf(HfFolder(config.model.path))
    policy.sleep()
    prm = reference = None
    if config.uses_prm:
        prm_setup = _setup_of(setup, config.prm.micro_batch_tokens, starts["prm"])
        prm = roles["prm"] = PrmRole(prm_setup, config.prm, num_steps=config.run.num_steps)
        prm.load_hf(HfFolder(starts["prm"]))
        prm.sleep()
    if config.reference.source == "sft" and (config.uses_prm or config.policy.kl_coef > 0):
        reference_path = config.reference.path or config.model.path
        reference = ReferenceRole(_setup_of(setup, config.reference.micro_batch_tokens, reference_path))
        reference.load_hf(HfFolder(reference_path))
        reference.sleep()
    with (
        running_engine(
            config.model.path, config.model.dtype, config.rollout, architecture, layout, config.run.num_threads
        ) as engine,
        _prepared(folder, config, roles, starts, resume_from) as (checkpoints, metrics),
        configured_verifier(config) as verifier,
        # Innermost: a rank that fails speaks before it closes anything.
        process.crash_report(),
    ):
        parts = PrimeParts(
            policy=policy,
            reference=reference,
            prm=prm,
            engine=engine,
            verifier=verifier,
            prompts=prompts,
            checkpoints=checkpoints,
            logger=metrics,
            failed_updates=FailedUpdateFiles(folder.failures, config),
            enter=process.watchdog.enter,
            should_stop=process.should_stop,
            min_groups=layout.dp_size
            * max(config.policy.num_minibatches, config.prm.num_minibatches if config.uses_prm else 1),
        )
        summary = PrimeTrainer(config, parts).train()
        process.watchdog.enter("export", config.run.num_steps)
        if config.checkpoint.export_hf:
            with awake(policy):
                export_hf(policy, folder.path / "hf", Path(config.model.path))
            if prm is not None:
                with awake(prm):
                    export_hf(prm, folder.path / "hf_prm", Path(starts["prm"]))
        return _finish(config, folder, summary, metrics)


def _run_sft(
    config: SftConfig, architecture: ModelArchitecture, layout: Layout, process: _Process
) -> Mapping[str, Any]:
    process.watchdog.enter("data", 0)
    examples = read_examples(config)
    logger.info("%d examples; left out: %s", len(examples), examples.dropped)
    process.watchdog.enter("start", 0)
    folder, resume_from = _run_folder(config, {"model": config.model.path})
    setup = role_setup(config, architecture, layout, folder)
    model = SftRole(setup, config.sft.optimizer, num_optimizer_steps=config.run.num_steps)
    if config.model.init == "weights":
        model.load_hf(HfFolder(config.model.path))
    prepared = _prepared(folder, config, {"model": model}, {"model": config.model.path}, resume_from)
    with prepared as (checkpoints, metrics), process.crash_report():
        trainer = SftTrainer(config, model, examples, checkpoints, metrics, process.should_stop, process.watchdog.enter)
        summary = trainer.train()
        process.watchdog.enter("export", config.run.num_steps)
        if config.checkpoint.export_hf:
            export_hf(model, folder.path / "hf", Path(config.model.path))
        return _finish(config, folder, summary, metrics)


def _check_disk(config: AnyConfig, architecture: ModelArchitecture) -> None:
    """`check_disk` by the main process, heard by all."""
    problem = None
    if collectives.is_main():
        try:
            check_disk(config, architecture)
        except CheckpointError as error:
            problem = error
    if problem := collectives.broadcast(problem):
        raise problem


def _run_folder(config: AnyConfig, starts: Mapping[str, str]) -> tuple[RunFolder, Path | None]:
    """The run's folder, and the checkpoint to go on from; `starts` are the folders that trained models come from."""
    folder = RunFolder(config.run.directory, config.run.name)
    folder.prepare(config, config.run.resume)
    identity = identity_of({role: read_architecture(path) for role, path in starts.items()}, config.model.dtype)
    return folder, find_checkpoint(folder.checkpoints, identity)


def role_setup(config: AnyConfig, architecture: ModelArchitecture, layout: Layout, folder: RunFolder) -> RoleSetup:
    """What every model of a run is built from."""
    with megatron_platform():
        from megatron_prime.mcore.libraries import choose_libraries

        logger.info("models: %s", choose_libraries(config.model, packed=config.micro_batch.packed))
    return RoleSetup(
        architecture=architecture,
        model=config.model,
        parallel=config.parallel,
        micro_batch=config.micro_batch,
        layout=layout,
        head=_head_options(config, architecture, layout, folder),
    )


def _setup_of(setup: RoleSetup, micro_batch_tokens: int | None, path: str | None = None) -> RoleSetup:
    """The same with a role's own micro-batches, and for the model of another folder."""
    if micro_batch_tokens is not None:
        cut = replace(setup.micro_batch, micro_batch_size=None, micro_batch_tokens=micro_batch_tokens)
        setup = replace(setup, micro_batch=cut)
    return setup if path is None else replace(setup, architecture=read_architecture(path))


def _head_options(config: AnyConfig, architecture: ModelArchitecture, layout: Layout, folder: RunFolder) -> HeadOptions:
    """How the log-prob op is computed: what the main process measures, or measured when the run began, for all."""
    section = config.head
    gemm: Any = section.gemm
    if gemm == "auto":
        found = None
        if collectives.is_main():
            padded = architecture.padded_vocab_size(config.model.make_vocab_size_divisible_by, layout.tp_size)
            found = (folder.recorded_head() or {}).get("gemm") or choose_gemm(
                DTYPES[config.model.dtype], padded // layout.tp_size, architecture.hidden_size, layout.device
            )
        gemm = collectives.broadcast(found)
    options = HeadOptions(
        backend=choose_backend(section.backend, layout.device),
        gemm=gemm,
        workspace_bytes=max(1, int(section.workspace_mib * 2**20)),
    )
    logger.info("log-prob op: %s backend, products by %s", options.backend, gemm)
    return options


@contextmanager
def _prepared(
    folder: RunFolder,
    config: AnyConfig,
    roles: Mapping[str, TrainableRole],
    starts: Mapping[str, str],
    resume_from: Path | None,
) -> Iterator[tuple[Checkpointer, RunLog]]:
    folder.write_versions()
    setup = next(iter(roles.values())).setup
    folder.write_head({"backend": setup.head.backend, "gemm": setup.head.gemm})
    checkpoints = Checkpointer(folder.checkpoints, roles, config.checkpoint, starts, resume_from)
    # Without a checkpoint the evaluation before the first step is repeated too.
    resume_step = step_of(resume_from) if resume_from else None
    folder.truncate_metrics(-1 if resume_step is None else resume_step)
    loggers = GuardedLoggers(config, folder, resume_step) if collectives.is_main() else None
    metrics = RunLog(folder, config.run.num_steps, enabled=collectives.is_main(), loggers=loggers)
    try:
        yield checkpoints, metrics
    finally:
        checkpoints.close()
        metrics.close()
        folder.close()


def configured_verifier(config: PrimeConfig) -> RoutingVerifier:
    """Builds the verifier of a configuration, for the abilities of its data."""
    abilities = ["math"] if config.data.kind == "arithmetic" else config.data.abilities
    return build_verifier(config.verifier, abilities)


def configured_prompts(config: PrimeConfig) -> PromptSource:
    prompts = read_prompts(config)
    logger.info("%d prompts; left out: %s", len(prompts), prompts.dropped)
    return prompts


def _finish(config: AnyConfig, folder: RunFolder, summary: Mapping[str, Any], metrics: RunLog) -> Mapping[str, Any]:
    full = {**summary, "commit": commit() if collectives.is_main() else None}
    metrics.close()
    if collectives.is_main():
        write_summary(folder, full)
        if config.run.plots:
            draw_plots(folder)
    collectives.barrier()
    return full
