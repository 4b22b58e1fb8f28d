"""The configuration of a run: pydantic dataclasses, ranges in the fields' types, meaning in the docstrings below them.

Defaults live here and nowhere else. Names that go to Megatron keep Megatron's spelling.
Two kinds of run: `PrimeConfig` (``kind: prime``) and `SftConfig` (``kind: sft``).
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_prime.config.schema_checkpoint import CheckpointSection
from megatron_prime.config.schema_data import ArithmeticData, FileData, OwnData
from megatron_prime.config.schema_model import HeadSection, MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.config.section import (
    MAY_CHANGE,
    AboveOne,
    Count,
    CountOrZero,
    Fraction,
    FractionAboveZero,
    FractionBelowOne,
    Named,
    NotNegative,
    Positive,
    Section,
)


@dataclass(kw_only=True, slots=True)
class RunSection(Section):
    """Name, place and length of the run."""

    name: str
    """Folder of the run below `directory`."""
    directory: Annotated[str, MAY_CHANGE] = "runs"
    """Where run folders are made."""
    num_steps: Annotated[Count, MAY_CHANGE]
    """Steps of training (PRIME: rollout-and-update steps; SFT: optimizer steps)."""
    # NumPy takes seeds of 32 bits.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of data order, sampling and random initialisation."""
    resume: Annotated[Literal["auto", "never"], MAY_CHANGE] = "auto"
    """`auto` goes on from the newest checkpoint of the run folder; `never` refuses a folder that has one."""
    num_threads: Annotated[Count, MAY_CHANGE] = 1
    """CPU threads of each process."""
    plots: Annotated[bool, MAY_CHANGE] = True
    """PNG plots of the metrics at the end."""
    loggers: Annotated[list[Annotated[str, Named("run.loggers")]], MAY_CHANGE] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Where metrics go besides metrics.jsonl and the console: `tensorboard`, `wandb`, or `package.module:function` of
    your own (docs/howto/)."""


@dataclass(kw_only=True, slots=True)
class OptimizerSection(Section):
    """Adam with decoupled weight decay."""

    lr: Positive
    min_lr: NotNegative = 0.0
    """What a decaying schedule ends at."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: CountOrZero = 0
    """Optimizer steps of linear warm-up; the first of them has learning rate 0."""
    adam_beta1: FractionBelowOne = 0.9
    adam_beta2: FractionBelowOne = 0.999
    adam_eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    """Of matrices; norms and biases do not decay (Megatron's rule)."""
    clip_grad: NotNegative = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    on_nonfinite: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """Where loss or gradients are infinite or no numbers: `stop` ends the run, `skip` leaves the optimizer step out. In
    both no weight has changed, and the batch is kept for `megatron-prime replay`."""
    max_skipped_steps: Annotated[CountOrZero, MAY_CHANGE] = 3
    """Optimizer steps in a row that `skip` leaves out before the run ends."""


@dataclass(kw_only=True, slots=True)
class VllmSection(Section):
    """The vLLM engine: a process of its own beside every data-parallel group of ranks, or servers."""

    tensor_parallel_size: Annotated[Count, MAY_CHANGE] = 1
    """Processes or GPUs of one engine."""
    max_model_len: Count | None = None
    """Longest prompt and answer together; null: the model's max_position_embeddings."""
    max_num_seqs: Annotated[Count, MAY_CHANGE] = 256
    """Answers that one engine samples at the same time."""
    kv_cache_gib: Annotated[Positive | None, MAY_CHANGE] = 1.0
    """Memory of each of an engine's GPUs or processes for keys and values; null: by gpu_memory_utilization."""
    gpu_memory_utilization: Annotated[FractionAboveZero, MAY_CHANGE] = 0.4
    """Share of a GPU's memory for one engine, where kv_cache_gib is null."""
    num_threads: Annotated[Count | None, MAY_CHANGE] = None
    """CPU threads of one engine; null: run.num_threads of each rank of its group."""
    pack_weights: Annotated[bool, MAY_CHANGE] = True
    """On a CPU, oneDNN's layout of the matrices: faster sampling, slower refit."""
    servers: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Addresses (`http://host:port`) of running servers (`megatron-prime serve`) that sample for all ranks. Empty: an
    engine of its own beside every data-parallel group."""
    in_ranks: Annotated[bool, MAY_CHANGE] = False
    """Engines inside the trainer's ranks (vLLM's external launcher), of tensor_parallel_size consecutive ranks each: no
    process more, and on GPUs an engine's memory is free while the models train."""
    transfer: Annotated[Literal["auto", "shared_memory", "ipc", "gloo", "nccl"], MAY_CHANGE] = "auto"
    """How weights get to an engine. Beside the trainer: `ipc`, buckets that the engine reads out of the trainer's GPU
    (on a CPU: out of host memory), or `shared_memory`, a second copy of all weights in host memory, from which an
    engine that was lost is replaced without the other ranks. Servers: `nccl` from GPU to GPU, or `gloo`. In the ranks:
    `shared_memory`. `auto`: on GPUs ipc and nccl, on CPUs shared_memory and gloo."""
    bucket_mib: Annotated[Count, MAY_CHANGE] = 64
    """Size of the buckets of all transfers but shared_memory; the sender holds two, and so does each receiver."""
    abort_after_seconds: Positive | None = None
    """Answers that are still being sampled so long after the first one began are cut off where they are, and count as
    truncated: a few endless ones then hold up nobody. What is cut off depends on the clock, so a run cannot be
    repeated exactly. null: wait for all."""
    verify_refit: Annotated[bool, MAY_CHANGE] = True
    """Compare checksums of the trainer's shards with what the engine received. (What the engine's layers hold is
    compared with what it received in any case.)"""
    timeout_seconds: Annotated[Positive, MAY_CHANGE] = 300.0
    """An engine that says nothing for so long is replaced. While it samples, a token of any answer is enough, so that
    answers may take longer; of a server that does not count its tokens (vLLM's `--disable-log-stats`) only whole
    answers are seen."""
    max_restarts: Annotated[CountOrZero, MAY_CHANGE] = 3
    """Engines that may be lost in one step before the run gives up. Of servers as many may be lost as there are others;
    this is how often a refit may fail by the fault of none of them."""


@dataclass(kw_only=True, slots=True)
class RolloutSection(Section):
    """Sampling of answers."""

    engine: Annotated[str, Named("rollout.engine")] = "transformers"
    """`transformers`: embedded in every process. `vllm`: a process beside each data-parallel group of ranks. An engine
    of your own: `package.module:function` (docs/reference/rollouts.md)."""
    num_prompts: Count
    """Groups of a step's batch (after filtering)."""
    # One answer has nothing to be compared with, and the filter keeps no such group.
    num_responses: Annotated[int, Field(ge=2)] = 4
    """Answers per prompt (K); advantages and the filter compare them."""
    # The policy is trained at the sampling temperature, so greedy sampling is for evaluation only.
    temperature: Positive = 1.0
    top_p: FractionAboveZero = 1.0
    max_response_tokens: Count = 3072
    stop_token_ids: list[CountOrZero] = field(default_factory=list)
    """Token ids that end an answer, besides the tokenizer's and generation config's end tokens."""
    max_batch_size: Count = 256
    """Answers that one process of the `transformers` engine samples at the same time."""
    max_logprob_gap: Positive = 0.1
    """Mean |difference| in nats between the engine's and the trainer's log-probs of the same tokens and weights, above
    which the run stops (float32: 1e-6, bfloat16: 1e-2): the engine does not compute with the trainer's weights."""
    vllm: VllmSection = field(default_factory=VllmSection)

    @property
    def uses_vllm(self) -> bool:
        """Whether the section `vllm` counts."""
        return self.engine == "vllm"


@dataclass(kw_only=True, slots=True)
class FilterSection(Section):
    """Which groups are worth training on."""

    enabled: bool = True
    min_accuracy: Fraction = 0.2
    max_accuracy: Fraction = 0.8
    """A group is kept when min_accuracy <= mean outcome <= max_accuracy."""
    max_attempts: Count = 4
    """Rounds of sampling per step at the most. What is kept by then is the step's batch; where that is too little to
    give every rank a share, nothing trains and the groups wait for the next step."""
    drop_truncated: bool = False
    """Also drop groups in which a response hit the length limit."""


@dataclass(kw_only=True, slots=True)
class PrmSection(Section):
    """The implicit process reward model."""

    path: str | None = None
    """Hugging Face folder to start from, also of a smaller model with the same tokenizer; null: the policy's start, as
    PRIME does."""
    beta: Positive = 0.05
    """Scale of the log ratio in rewards and loss."""
    loss: Annotated[str, Named("prm.loss")] = "cross_entropy"
    aggregation: Literal["sum", "mean"] = "sum"
    """Sequence logit: beta times the sum or the mean of the token log ratios."""
    soft_labels: bool = False
    """Train on fractional outcomes as they are; false: label 1 only for a full reward."""
    update: Literal["after", "before"] = "after"
    """Rewards come from the PRM as it is before its update (`after`, single forward) or from the updated one."""
    num_minibatches: Count = 1
    """Optimizer steps per pass."""
    num_window_batches: Count = 1
    """The PRM trains on this many latest batches each step (1: the step's own, as published)."""
    warmup_steps: CountOrZero = 0
    """First steps in which only the PRM trains."""
    micro_batch_tokens: Count | None = None
    """Tokens of this model's micro-batches, in place of `micro_batch.*`; null: as those say."""
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-6, clip_grad=10.0))


@dataclass(kw_only=True, slots=True)
class ReferenceSection(Section):
    """Where log p_ref comes from."""

    source: Literal["sft", "policy"] = "sft"
    """`sft`: a frozen copy of the start; `policy`: the policy before its update (no extra model)."""
    path: str | None = None
    """Hugging Face folder of the frozen model; the policy's start where null. A PRM of another shape than the policy
    (`prm.path`) needs the model that it started from here."""
    micro_batch_tokens: Count | None = None
    """Tokens of this model's micro-batches, in place of `micro_batch.*`; null: as those say."""


@dataclass(kw_only=True, slots=True)
class AdvantageSection(Section):
    """How outcomes and process rewards become advantages."""

    estimator: Annotated[str, Named("advantage.estimator")] = "rloo"
    process_source: Annotated[str, Named("advantage.process_source")] = "implicit"
    """Where process rewards come from: `implicit`, the PRM that learns from outcomes, or a function of your own."""
    process_baseline: Literal["strict", "group"] = "strict"
    """RLOO baseline of process rewards: leave-one-out mean (paper) or the released code's K/(K-1) form."""
    wrong_answers: Literal["full", "spare"] = "full"
    """`spare`: outcomes teach by answers above their baseline alone; advantages are then scaled and not shifted. See
    docs/reference/credit-experiments.md for what it gains and may cost."""
    outcome_coef: NotNegative = 1.0
    process_coef: NotNegative = 1.0
    """0 makes outcome-only training; no PRM is then built."""
    outcome_gamma: Fraction = 1.0
    process_gamma: Fraction = 1.0
    process_scale: Literal["none", "max", "rms"] = "max"
    """Divide process rewards by the global max or RMS of their returns."""
    process_gate: Literal["none", "auc"] = "auc"
    """`auc` scales the process source by how far the PRM's fresh outcome AUC is above chance."""
    gate_smoothing: FractionBelowOne = 0.5
    """Weight of the gate's past in its moving average, in [0, 1)."""
    whiten: bool = True
    """Zero mean and unit variance over all response tokens of the batch."""


@dataclass(kw_only=True, slots=True)
class PolicySection(Section):
    """The policy update."""

    loss: Annotated[str, Named("policy.loss")] = "ppo_clip"
    clip_ratio_low: FractionAboveZero = 0.2
    clip_ratio_high: Positive = 0.2
    dual_clip: AboveOne | None = None
    """Bound c > 1 of the loss for negative advantages; off where null."""
    loss_normalization: Literal["token", "sequence"] = "token"
    """Mean over all response tokens, or over responses of their token means; of the whole mini-batch."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL estimate (k3) to the reference in the loss."""
    importance_cap: Positive | None = None
    """Truncated importance sampling between engine and trainer: tokens weigh min(p_train / p_rollout, this), from the
    log-probs that the engine reported; off where null."""
    max_sequence_ratio: AboveOne | None = None
    """Responses whose geometric-mean p_train / p_rollout is above this, or below its inverse, do not train the
    policy; off where null."""
    num_minibatches: Count = 1
    """Optimizer steps per pass over the batch."""
    num_epochs: Count = 1
    micro_batch_tokens: Count | None = None
    """Tokens of this model's micro-batches, in place of `micro_batch.*`; null: as those say."""
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=5e-7, weight_decay=0.01))


@dataclass(kw_only=True, slots=True)
class EvaluationSection(Section):
    """avg@k on held-out prompts, before, during and after training."""

    every_steps: CountOrZero = 10
    """0: only before the first and after the last step."""
    num_prompts: CountOrZero = 400
    """0 switches evaluation off."""
    num_responses: Count = 1
    """k of avg@k."""
    temperature: NotNegative = 1.0


@dataclass(kw_only=True, slots=True)
class SftSection(Section):
    """Supervised fine-tuning."""

    batch_size: Count
    """Examples per optimizer step, over all ranks."""
    log_every_steps: Count = 10
    """Optimizer steps between rows of the metrics log."""
    optimizer: OptimizerSection


@dataclass(kw_only=True, slots=True)
class PrimeConfig(Section):
    """A PRIME run."""

    kind: Literal["prime"] = "prime"
    run: RunSection
    model: ModelSection
    parallel: Annotated[ParallelSection, MAY_CHANGE] = field(default_factory=ParallelSection)
    micro_batch: Annotated[MicroBatchSection, MAY_CHANGE] = field(
        default_factory=lambda: MicroBatchSection(micro_batch_tokens=8192)
    )
    head: HeadSection = field(default_factory=HeadSection)
    data: Annotated[ArithmeticData | FileData | OwnData, Field(discriminator="kind")]
    rollout: RolloutSection
    verifier: Annotated[VerifierSection, MAY_CHANGE] = field(default_factory=VerifierSection)
    filter: FilterSection = field(default_factory=FilterSection)
    prm: PrmSection = field(default_factory=PrmSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    advantage: AdvantageSection = field(default_factory=AdvantageSection)
    policy: PolicySection = field(default_factory=PolicySection)
    evaluation: Annotated[EvaluationSection, MAY_CHANGE] = field(default_factory=EvaluationSection)
    checkpoint: Annotated[CheckpointSection, MAY_CHANGE] = field(default_factory=CheckpointSection)

    @property
    def uses_prm(self) -> bool:
        """Whether there is an implicit PRM: process rewards take part, and come from it."""
        return self.advantage.process_coef != 0.0 and self.advantage.process_source == "implicit"

    @property
    def policy_scores_in_update(self) -> bool:
        """Whether the policy's update sees the whole batch before anything changes, and nobody else asks for scores."""
        section = self.policy
        corrects = section.importance_cap is not None or section.max_sequence_ratio is not None
        return section.num_minibatches == 1 and not corrects and self.reference.source != "policy"


@dataclass(kw_only=True, slots=True)
class SftConfig(Section):
    """A supervised run that makes the starting model."""

    kind: Literal["sft"] = "sft"
    run: RunSection
    model: ModelSection
    parallel: Annotated[ParallelSection, MAY_CHANGE] = field(default_factory=ParallelSection)
    micro_batch: Annotated[MicroBatchSection, MAY_CHANGE] = field(
        default_factory=lambda: MicroBatchSection(micro_batch_tokens=8192)
    )
    head: HeadSection = field(default_factory=HeadSection)
    data: Annotated[ArithmeticData | FileData, Field(discriminator="kind")]
    sft: SftSection
    checkpoint: Annotated[CheckpointSection, MAY_CHANGE] = field(default_factory=CheckpointSection)


AnyConfig = Annotated[PrimeConfig | SftConfig, Field(discriminator="kind")]
