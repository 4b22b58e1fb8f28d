"""What flows between the stages of a step: frozen dataclasses, never string-keyed dicts.

Dimension names used in every docstring of the package:

* ``B``: responses of the batch (all groups, group after group);
* ``R``: response positions, right-padded to the longest response of the batch;
* ``T``: packed tokens (no padding);
* ``K``: responses of one group (one prompt). Groups may differ in size: a response whose
  verdict is missing has been dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem, tokenized and ready for the engine."""

    prompt_id: str
    """Stable and unique in its dataset; seeds of the samples derive from it."""
    text: str
    """The prompt as the model sees it (template applied)."""
    token_ids: tuple[int, ...]
    ground_truth: str
    ability: str = "math"
    data_source: str = ""
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One sampled answer."""

    text: str
    token_ids: tuple[int, ...]
    """Includes the end token when ``finish_reason`` is ``stop``."""
    logprobs: tuple[float, ...]
    """Log-probability of each token under the sampling distribution (temperature applied)."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that sampled it (``Engine.load_weights``); of its first token, if several did."""
    spans_versions: bool = False
    """Whether weights changed between its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How answers are sampled."""

    num_responses: int
    """Answers per prompt."""
    temperature: float
    """0 = greedy."""
    top_p: float
    max_response_tokens: int
    seed: int
    """With the prompt's id and the answer's number it fixes the randomness of one answer, whatever the
    batch around it, the rank that samples it or the order of the prompts."""
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpan:
    """One reasoning step of a response and whether it is right (known only where a generator knows)."""

    start: int
    """First token of the step, an index into the response's tokens."""
    stop: int
    """One past its last token."""
    correct: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SftExample:
    """A prompt with the answer to imitate."""

    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    """Includes the end token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the verifier says of one response."""

    status: str
    """``correct``, ``wrong``, ``no_answer``, ``malformed``, ``too_long``, ``timeout`` or ``grader_error``."""
    reward: float | None
    """Outcome in [0, 1]; ``None`` = missing: the response takes no part in training."""
    extracted: str | None = None
    seconds: float = 0.0
    reason: str = ""
    """Why there is no reward, where the truth or the tests are at fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt with its verified responses; every response has a reward (missing ones were dropped)."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Mean outcome of the group, in [0, 1]."""
        return sum(self.rewards) / len(self.rewards)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """The whole batch of a step, on the CPU, identical on every rank."""

    prompt_token_ids: tuple[tuple[int, ...], ...]
    """Per response (a prompt repeats for each of its responses), length B."""
    response_ids: torch.Tensor
    """int64 [B, R], right-padded with 0."""
    mask: torch.Tensor
    """bool [B, R], true on response tokens incl. the end token."""
    rollout_logprobs: torch.Tensor
    """float32 [B, R], as the engine reported them; 0 on padding."""
    outcomes: torch.Tensor
    """float32 [B], verifier rewards in [0, 1]."""
    group_index: torch.Tensor
    """int64 [B], which group each response belongs to, 0 .. num_groups - 1."""
    weight_versions: torch.Tensor
    """int64 [B], of the weights that sampled each response; -1 if several did."""

    @property
    def num_responses(self) -> int:
        return self.response_ids.shape[0]

    @property
    def num_groups(self) -> int:
        return len(self.group_index.unique())

    @classmethod
    def from_groups(cls, groups: Sequence[Group]) -> RolloutBatch:
        """Flattens groups to padded tensors, group after group."""
        rows = [(index, g, i) for index, g in enumerate(groups) for i in range(len(g.responses))]
        width = max((len(g.responses[i].token_ids) for _, g, i in rows), default=0)
        response_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        logprobs = torch.zeros(len(rows), width, dtype=torch.float32)
        for row, (_, group, i) in enumerate(rows):
            response = group.responses[i]
            length = len(response.token_ids)
            response_ids[row, :length] = torch.tensor(response.token_ids, dtype=torch.int64)
            logprobs[row, :length] = torch.tensor(response.logprobs, dtype=torch.float32)
            mask[row, :length] = True
        return cls(
            prompt_token_ids=tuple(g.prompt.token_ids for _, g, _ in rows),
            response_ids=response_ids,
            mask=mask,
            rollout_logprobs=logprobs,
            outcomes=torch.tensor([g.rewards[i] for _, g, i in rows], dtype=torch.float32),
            group_index=torch.tensor([index for index, _, _ in rows], dtype=torch.int64),
            weight_versions=torch.tensor([_version(g.responses[i]) for _, g, i in rows], dtype=torch.int64),
        )


def _version(response: Response) -> int:
    return -1 if response.spans_versions else response.weight_version


@dataclass(frozen=True, kw_only=True, slots=True)
class PrmBatch:
    """A rollout batch as the PRM saw it before it trained on it; log-probs without temperature, 0 on padding."""

    rollout: RolloutBatch
    reference_logprobs: torch.Tensor
    """float32 [B, R]."""
    prm_logprobs: torch.Tensor
    """float32 [B, R], of one PRM snapshot for the whole batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """A rollout batch with all models' log-probs from before the step's updates, each float32 [B, R], 0 on padding."""

    rollout: RolloutBatch
    policy_logprobs: torch.Tensor
    """At the sampling temperature."""
    reference_logprobs: torch.Tensor | None
    """Without temperature; None: the run has no reference."""
    prm_logprobs: torch.Tensor | None
    """Without temperature; None: the run has no PRM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReward:
    """A process reward for one reasoning step of a response."""

    start: int
    """First token of the step, an index into the response's tokens."""
    stop: int
    """One past its last token."""
    reward: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessInputs:
    """What process rewards are made from, whoever makes them."""

    groups: tuple[Group, ...]
    """Prompts and answers as text and tokens; row ``i`` of `rollout` is the i-th answer, group after group."""
    rollout: RolloutBatch
    prm: PrmBatch | None
    """What the implicit PRM says of the batch; None: the run has none."""
    beta: float
    """Scale of the PRM's log-ratio (`prm.beta`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrmUpdate:
    """What the PRM was to be trained on in a step."""

    step: int
    batches: tuple[PrmBatch, ...]
    """The window, oldest first."""
    seed: int
    """Of the mini-batch order."""
    role: ClassVar[Literal["prm"]] = "prm"


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyUpdate:
    """What the policy was to be trained on in a step."""

    step: int
    batch: ScoredBatch
    advantages: torch.Tensor
    """float32 [B, R]."""
    seed: int
    """Of the mini-batch order."""
    role: ClassVar[Literal["policy"]] = "policy"


ModelUpdate = PrmUpdate | PolicyUpdate


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What the update of a model on one batch has shown."""

    metrics: dict[str, float]
    """Means over the optimizer steps; `max_*` maxima; `skipped` the share of steps that were left out."""
    logprobs: torch.Tensor
    """float32 [B, R], of the model as it was before the update."""
