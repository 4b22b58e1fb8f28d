"""The sampling loop: continuous batching over a key-value cache.

Answers share a batch but not their fate: an answer that ends leaves the batch, a waiting one takes its row, and the
tokens of each depend on nothing but its own prompt, its key and the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from megatron_prime.errors import NonFiniteError
from megatron_prime.rollout.embedded.kv_cache import Decode, KVCache, Prefill
from megatron_prime.rollout.randomness import uniforms

_MIN_ENDED_SHARE = 0.0625
"""Rows of ended answers are dropped from the batch at this share of it; measured: slower from 0.125 on."""
_MIN_FREE_SHARE = 0.125
"""Waiting answers are admitted when this share of the rows is free, so that their prompts are prefilled together."""
_MAX_PREFILL_TOKENS = 16384
"""Tokens of one prefill pass at the most, padding included; bounds its activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to be sampled; those of the same prompt stand side by side to share its prefill."""

    prompt: tuple[int, ...]
    key: int
    """Fixes the randomness of the answer (`answer_key`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A sampled answer."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    """Whether the last token is a stop token (otherwise the limit was reached)."""


def pick_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    Args:
        logits: [n, V].
        uniform: float64 [n] from `uniforms`.
        temperature: 0 takes the most likely token.
        top_p: below 1, only the smallest set of most likely tokens with at least this mass can be drawn.

    Returns:
        Tokens, int64 [n], and their log-probabilities under the distribution they were drawn from (temperature and
        top-p applied; of the unscaled model where the temperature is 0), float32 [n].
    """
    # NaN in a row reaches its maximum; what is drawn from it would be no token.
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise NonFiniteError(
            "sampling: the model's logits are infinite or no numbers; an update has made its weights too large: lower "
            "policy.optimizer.lr and go on from the last checkpoint"
        )
    if temperature == 0:
        logprobs = logits.float().log_softmax(dim=-1)
        best, tokens = logprobs.max(dim=-1)
        return tokens, best
    logprobs = logits.float().div(temperature).log_softmax(dim=-1)
    if top_p >= 1:
        choice = _invert(logprobs.exp().cumsum(dim=-1, dtype=torch.float64), uniform)
        return choice, _at(logprobs, choice)
    logprobs, tokens = logprobs.sort(dim=-1, descending=True, stable=True)
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    last = (cumulative < top_p).sum(dim=-1).clamp_(max=logits.shape[-1] - 1)
    mass = _at(cumulative, last)
    choice = _invert(cumulative.clamp_(max=mass[:, None]), uniform)
    return _at(tokens, choice), _at(logprobs, choice) - mass.log().float()


def _invert(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First index whose cumulative mass [n, V] exceeds the share ``uniform`` [n] of the total."""
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index[:, None])[:, 0]


class Sampler:
    """Samples all requests of one call; see `sample`."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        max_rows: int,
        on_ended: Callable[[int, Sample], None],
    ) -> None:
        self.on_ended = on_ended
        self.model = model
        self.requests = requests
        self.temperature = temperature
        self.top_p = top_p
        self.max_tokens = max_tokens
        device = model.device
        # Stable, so that answers of one prompt stay neighbours; longest first, so that prompts of a prefill pass
        # differ little in length and the cache reaches its final size early.
        self.waiting = deque(sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt)))
        self.num_rows = 0
        self.max_rows = min(max_rows, len(requests))
        self.cache = KVCache(self.max_rows, max(len(request.prompt) for request in requests) + max_tokens)
        self.longest = 0
        """At least 1 + the largest position, known without asking the device."""
        self.state = torch.zeros(5, self.max_rows, dtype=torch.int64, device=device)
        """Per row: request, key, token to feed, its position, tokens drawn so far (`max_tokens`: ended)."""
        # The extra column takes what ended rows draw until they leave the batch.
        self.tokens = torch.zeros(len(requests), max_tokens + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(len(requests), max_tokens + 1, dtype=torch.float32, device=device)
        self.is_stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.is_stop[[token for token in stop_token_ids if token < model.config.vocab_size]] = True

    def run(self) -> None:
        """Samples until every request has ended."""
        while True:
            num_free = self.max_rows - self.num_rows
            if self.waiting and num_free >= _MIN_FREE_SHARE * self.max_rows:
                self._admit(min(num_free, len(self.waiting)))
            if self.num_rows == 0:
                return
            self._step()
            self._drop_ended()

    def _admit(self, num_requests: int) -> None:
        """Prefills the prompts of the next requests into free rows; their last tokens join the next step."""
        admitted = [self.waiting.popleft() for _ in range(num_requests)]
        prompts = [self.requests[index].prompt for index in admitted]
        columns = [
            (index, self.requests[index].key, prompt[-1], len(prompt) - 1, 0)
            for index, prompt in zip(admitted, prompts, strict=True)
        ]
        first, self.num_rows = self.num_rows, self.num_rows + num_requests
        self.state[:, first : self.num_rows] = torch.tensor(columns, device=self.state.device).T
        self.longest = max(self.longest, *(len(prompt) for prompt in prompts))
        self.cache.reserve(self.longest)
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts, start=first):
            rows_of.setdefault(prompt, []).append(row)
        distinct = [prompt for prompt in rows_of if len(prompt) > 1]
        while distinct:
            # The first prompt is the longest of those left.
            count = max(1, _MAX_PREFILL_TOKENS // len(distinct[0]))
            self._prefill({prompt: rows_of[prompt] for prompt in distinct[:count]})
            distinct = distinct[count:]

    def _prefill(self, rows_of: dict[tuple[int, ...], list[int]]) -> None:
        """Stores all but the last token of each prompt in its rows."""
        device = self.state.device
        width = max(len(prompt) for prompt in rows_of) - 1
        token_ids = torch.tensor([(*prompt[:-1], *[0] * (width + 1 - len(prompt))) for prompt in rows_of])
        rows = torch.tensor([row for rows in rows_of.values() for row in rows], device=device)
        sources = torch.tensor([i for i, rows in enumerate(rows_of.values()) for _ in rows], device=device)
        self.model.base_model(
            input_ids=token_ids.to(device),
            position_ids=torch.arange(width, device=device)[None],
            use_cache=False,
            kv=Prefill(self.cache, rows, sources),
        )

    def _step(self) -> None:
        """Draws the next token of every row."""
        request, key, token, position, drawn = self.state[:, : self.num_rows]
        self.cache.reserve(self.longest)
        logits = self.model(
            input_ids=token[:, None],
            position_ids=position[:, None],
            use_cache=False,
            kv=Decode(self.cache, position, self.longest, self.model.dtype),
        ).logits[:, -1]
        picked, logprob = pick_tokens(logits, uniforms(key, drawn), temperature=self.temperature, top_p=self.top_p)
        self.tokens[request, drawn] = picked
        self.logprobs[request, drawn] = logprob
        token.copy_(picked)
        drawn.copy_(torch.where(self.is_stop[picked], self.max_tokens, drawn + 1).clamp_(max=self.max_tokens))
        position += drawn < self.max_tokens
        # Ended rows that ride along stand still, so this may run ahead of them, but no row ever needs more.
        self.longest = min(self.longest + 1, self.cache.max_length)

    def _drop_ended(self) -> None:
        """Closes the gaps that ended answers left, once there are enough of them."""
        alive = self.state[4, : self.num_rows] < self.max_tokens
        num_alive = int(alive.sum())
        if self.num_rows - num_alive < max(1, _MIN_ENDED_SHARE * self.num_rows):
            return
        self._report(self.state[0, : self.num_rows][~alive])
        gaps = (~alive[:num_alive]).nonzero()[:, 0]
        movers = alive[num_alive:].nonzero()[:, 0] + num_alive
        self.state[:, gaps] = self.state[:, movers]
        self.cache.move(movers, gaps)
        self.num_rows = num_alive
        self.longest = int(self.state[3, :num_alive].max()) + 1 if num_alive else 0

    def _report(self, requests: torch.Tensor) -> None:
        """Hands out the answers of requests that have ended, each cut after its first stop token."""
        tokens, logprobs = self.tokens[requests, : self.max_tokens], self.logprobs[requests, : self.max_tokens]
        hits = self.is_stop[tokens]
        stopped = hits.any(dim=1)
        lengths = torch.where(stopped, hits.byte().argmax(dim=1) + 1, self.max_tokens)
        columns = zip(requests.tolist(), tokens.cpu(), logprobs.cpu(), lengths.tolist(), stopped.tolist(), strict=True)
        for request, ids, values, n, stop in columns:
            answer = Sample(token_ids=tuple(ids[:n].tolist()), logprobs=tuple(values[:n].tolist()), stopped=stop)
            self.on_ended(request, answer)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    stop_token_ids: Sequence[int],
    max_rows: int,
    on_ended: Callable[[int, Sample], None] | None = None,
) -> list[Sample]:
    """Samples one answer per request.

    Args:
        model: a causal language model in eval mode, built with `kv_cache.ATTENTION_NAME` as attention.
        requests: any number of them; prompts hold at least one token.
        temperature: 0 = greedy.
        top_p: in (0, 1].
        max_tokens: of each answer.
        stop_token_ids: an answer ends after the first of these.
        max_rows: answers that are sampled at the same time.
        on_ended: takes the number of a request and its answer soon after it has ended, while others are sampled.

    Returns:
        The answers in the order of the requests.
    """
    if not requests:
        return []
    samples: dict[int, Sample] = {}

    def take(request: int, answer: Sample) -> None:
        samples[request] = answer
        if on_ended is not None:
            on_ended(request, answer)

    sampler = Sampler(
        model,
        requests,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        max_rows=max_rows,
        on_ended=take,
    )
    sampler.run()
    return [samples[request] for request in range(len(requests))]
