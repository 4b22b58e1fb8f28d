"""The sampling loop: what is drawn, with which log-probs, and that the batch around an answer does not matter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from tiny_engines import CONFIGS, VOCAB_SIZE, TinyModel, make_prompt, make_prompts

from megatron_prime.batch import Response, SamplingParams
from megatron_prime.errors import NonFiniteError, RolloutError
from megatron_prime.rollout.embedded import sampling as sampling_module
from megatron_prime.rollout.embedded.sampling import pick_tokens
from megatron_prime.rollout.randomness import answer_key, uniforms

PARAMS = SamplingParams(num_responses=4, temperature=1.0, top_p=1.0, max_response_tokens=24, seed=11)


def change(params: SamplingParams = PARAMS, **fields: object) -> SamplingParams:
    return dataclasses.replace(params, **fields)  # pyright: ignore[reportArgumentType]


def slow_logprobs(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Sampling distribution of one token by its definition, in float64."""
    scaled = [x / temperature for x in logits]
    normaliser = max(scaled) + math.log(sum(math.exp(x - max(scaled)) for x in scaled))
    logprobs = [x - normaliser for x in scaled]
    kept: set[int] = set()
    for token in sorted(range(len(logits)), key=lambda i: -logprobs[i]):
        if sum(math.exp(logprobs[i]) for i in kept) >= top_p and kept:
            break
        kept.add(token)
    mass = sum(math.exp(logprobs[i]) for i in kept)
    return [logprobs[i] - math.log(mass) if i in kept else -math.inf for i in range(len(logits))]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.7, 0.8)])
def test_logprobs_equal_a_full_forward(
    tiny: Callable[[str], TinyModel], name: str, temperature: float, top_p: float
) -> None:
    model = tiny(name)
    prompts = make_prompts(8)
    groups = model.loaded_engine(max_batch_size=13).generate(prompts, change(temperature=temperature, top_p=top_p))
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            token_ids = torch.tensor([prompt.token_ids + response.token_ids])
            with torch.inference_mode():
                logits = model.reference(token_ids).logits[0, len(prompt.token_ids) - 1 : -1]
            expected = [
                slow_logprobs(row, temperature, top_p)[token]
                for row, token in zip(logits.double().tolist(), response.token_ids, strict=True)
            ]
            assert response.logprobs == pytest.approx(expected, abs=1e-5)


def test_greedy_takes_the_best_token_and_reports_the_model(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("qwen3")
    prompt = make_prompts(1)[0]
    first, second = model.loaded_engine().generate([prompt], change(temperature=0.0, num_responses=2))[0]
    # Two rows of one product: with several threads their sums may be cut at other places.
    assert first.token_ids == second.token_ids
    assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)
    with torch.inference_mode():
        logits = model.reference(torch.tensor([prompt.token_ids + first.token_ids])).logits[0]
    logits = logits[len(prompt.token_ids) - 1 : -1].double()
    assert first.token_ids == tuple(logits.argmax(dim=1).tolist())
    assert first.logprobs == pytest.approx(logits.log_softmax(dim=1).max(dim=1).values.tolist(), abs=1e-5)


def test_tokens_do_not_depend_on_the_batch(tiny: Callable[[str], TinyModel]) -> None:
    engine = tiny("qwen2_tied").loaded_engine(max_batch_size=64)
    prompts = make_prompts(64)
    together = engine.generate(prompts, change(num_responses=1))
    for index in (0, 1, 17, 63):
        alone = engine.generate([prompts[index]], change(num_responses=1))
        assert [r.token_ids for r in alone[0]] == [r.token_ids for r in together[index]]
    backwards = engine.generate(prompts[::-1], change(num_responses=1))[::-1]
    assert [g[0].token_ids for g in backwards] == [g[0].token_ids for g in together]


@pytest.mark.parametrize("max_batch_size", [1, 3, 7, 40])
@pytest.mark.parametrize(
    ("ended", "free", "prefill"), [(0.01, 0.01, 1), (0.0625, 0.125, 16384), (0.6, 0.01, 30), (0.9, 0.9, 30)]
)
def test_rows_that_leave_and_join_change_nothing(
    tiny: Callable[[str], TinyModel],
    monkeypatch: pytest.MonkeyPatch,
    max_batch_size: int,
    ended: float,
    free: float,
    prefill: int,
) -> None:
    prompts = make_prompts(10, longest=60)
    params = change(max_response_tokens=30, stop_token_ids=(2, 3))
    expected = [tiny("llama").loaded_engine().generate([p], change(params, num_responses=1))[0][0] for p in prompts[:4]]
    monkeypatch.setattr(sampling_module, "_MIN_ENDED_SHARE", ended)
    monkeypatch.setattr(sampling_module, "_MIN_FREE_SHARE", free)
    monkeypatch.setattr(sampling_module, "_MAX_PREFILL_TOKENS", prefill)
    monkeypatch.setattr("megatron_prime.rollout.embedded.kv_cache._MIN_GROWTH", 1)
    groups = tiny("llama").loaded_engine(max_batch_size=max_batch_size).generate(prompts, params)
    assert len({len(r.token_ids) for g in groups for r in g}) > 5, "answers of one length would test nothing"
    for group, alone in zip(groups, expected, strict=False):
        assert group[0].token_ids == alone.token_ids
        assert group[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_an_ended_row_may_ride_along_at_the_last_position(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny("llama").loaded_engine(max_batch_size=3, end_token_ids=())
    params = change(num_responses=1, max_response_tokens=16)
    candidates = [make_prompt(f"c{i}", [4, 8]) for i in range(80)]
    answers = [group[0].token_ids for group in engine.generate(candidates, params)]
    longest = make_prompt("longest", [6] * 80)
    stop = next(t for t in range(VOCAB_SIZE) if t not in engine.generate([longest], params)[0][0].token_ids)
    brief = [p for p, ids in zip(candidates, answers, strict=True) if stop in ids[:3]]
    full = [p for p, ids in zip(candidates, answers, strict=True) if stop not in ids]
    # The brief ones leave in pairs, so the full ones start later than the longest prompt and outlive it; one ended
    # row of three is then too few to be dropped.
    monkeypatch.setattr(sampling_module, "_MIN_ENDED_SHARE", 0.6)
    prompts = [longest, *brief[:4], *full[:2]]
    groups = engine.generate(prompts, change(params, stop_token_ids=(stop,)))
    assert [len(groups[i][0].token_ids) for i in (0, 5, 6)] == [16, 16, 16]
    assert [g[0].token_ids for g in groups[5:]] == [answers[candidates.index(p)] for p in full[:2]]


def test_answers_of_a_prompt_differ_and_seeds_matter(tiny: Callable[[str], TinyModel]) -> None:
    engine = tiny("qwen2_tied").loaded_engine()
    prompts = make_prompts(3)
    groups = engine.generate(prompts, PARAMS)
    assert all(len({r.token_ids for r in group}) == PARAMS.num_responses for group in groups)
    assert engine.generate(prompts, PARAMS) == groups
    other_seed = engine.generate(prompts, change(seed=12))
    assert all(a.token_ids != b.token_ids for g, h in zip(groups, other_seed, strict=True) for a, b in zip(g, h))  # noqa: B905
    fewer = engine.generate(prompts, change(num_responses=2))
    assert [[r.token_ids for r in g[:2]] for g in groups] == [[r.token_ids for r in g] for g in fewer]
    same_text = [make_prompt("other", prompts[0].token_ids)]
    assert engine.generate(same_text, PARAMS)[0][0].token_ids != groups[0][0].token_ids


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.75)])
def test_drawn_tokens_follow_the_distribution(temperature: float, top_p: float) -> None:
    num_draws = 20_000
    logits = torch.tensor([0.3, -1.0, 1.2, -torch.inf, 0.3, -4.0])
    keys = torch.tensor([answer_key(0, "p", k) for k in range(num_draws)])
    uniform = uniforms(keys, torch.zeros(num_draws, dtype=torch.int64))
    tokens, _ = pick_tokens(logits.expand(num_draws, -1), uniform, temperature=temperature, top_p=top_p)
    logprobs = slow_logprobs(logits.double().tolist(), temperature, top_p)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    possible = [i for i, x in enumerate(logprobs) if x > -math.inf]
    assert sum(counts[i] for i in possible) == num_draws
    expected = [num_draws * math.exp(logprobs[i]) for i in possible]
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in zip(possible, expected, strict=True))
    assert chi_square < {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5}[len(possible)]  # 0.999 quantiles


def test_first_tokens_of_a_model_follow_its_distribution(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("qwen3")
    prompt = make_prompt("p", [4, 9, 2])
    num_draws = 8000
    params = change(num_responses=num_draws, max_response_tokens=1, temperature=2.0)
    group = model.loaded_engine(max_batch_size=4000).generate([prompt], params)[0]
    with torch.inference_mode():
        expected = (model.reference(torch.tensor([prompt.token_ids])).logits[0, -1].double() / 2).softmax(0) * num_draws
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in group]), minlength=VOCAB_SIZE).double()
    assert expected.min() > 5  # what the chi-square approximation asks for
    assert ((counts - expected) ** 2 / expected).sum().item() < 48.3  # 0.999 quantile for 22 degrees of freedom


def test_extreme_uniforms_stay_inside_the_support() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, 0.0, -torch.inf]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    assert pick_tokens(logits, uniform, temperature=1.0, top_p=1.0)[0].tolist() == [1, 2]
    tokens, logprobs = pick_tokens(logits, uniform, temperature=1.0, top_p=0.5)
    assert tokens.tolist() == [1, 1]
    assert logprobs.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_stop_and_length(tiny: Callable[[str], TinyModel]) -> None:
    engine = tiny("qwen2_untied").loaded_engine(end_token_ids=(1, 5))
    params = change(stop_token_ids=(9, 10**9), num_responses=8, max_response_tokens=10)
    responses = [r for g in engine.generate(make_prompts(20), params) for r in g]
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for response in responses:
        assert not {1, 5, 9} & set(response.token_ids[:-1])
        assert len(response.logprobs) == len(response.token_ids)
        stopped = response.token_ids[-1] in (1, 5, 9)
        assert response.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(response.token_ids) == 10
        shown = response.token_ids[:-1] if stopped else response.token_ids
        assert response.text == " ".join(map(str, shown))
        assert response.weight_version == 7
    assert {r.token_ids[-1] for r in responses if r.finish_reason == "stop"} == {1, 5, 9}


def test_stop_on_the_first_token(tiny: Callable[[str], TinyModel]) -> None:
    engine = tiny("llama").loaded_engine(end_token_ids=tuple(range(VOCAB_SIZE)))
    for response in engine.generate(make_prompts(1), PARAMS)[0]:
        assert (len(response.token_ids), len(response.logprobs), response.finish_reason) == (1, 1, "stop")
        assert response.text == ""


def test_a_prompt_may_fill_the_positions_exactly_but_not_more(tiny: Callable[[str], TinyModel]) -> None:
    engine = tiny("llama").loaded_engine(end_token_ids=())
    params = change(max_response_tokens=16, num_responses=2)
    fits = make_prompt("fits", [3] * 80)
    assert [len(r.token_ids) for r in engine.generate([fits], params)[0]] == [16, 16]
    bad = [fits, make_prompt("long", [3] * 81), make_prompt("empty", []), make_prompt("alien", [VOCAB_SIZE])]
    with pytest.raises(RolloutError) as caught:
        engine.generate(bad, params)
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["long", "empty", "alien"]
    assert "81 tokens" in lines[0] and "limit of 96" in lines[0]


def test_no_prompts(tiny: Callable[[str], TinyModel]) -> None:
    assert tiny("llama").loaded_engine().generate([], PARAMS) == []


def test_prefill_is_shared(tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled: list[tuple[int, ...]] = []
    original = sampling_module.Sampler._prefill

    def spy(self: sampling_module.Sampler, rows_of: dict[tuple[int, ...], list[int]]) -> None:
        prefilled.extend(rows_of)
        original(self, rows_of)

    monkeypatch.setattr(sampling_module.Sampler, "_prefill", spy)
    prompts = [p for p in make_prompts(9) if len(p.token_ids) > 1]
    groups: list[list[Response]] = tiny("qwen2_tied").loaded_engine().generate(prompts, change(num_responses=6))
    assert sorted(prefilled) == sorted(p.token_ids for p in prompts)
    assert all(len(group) == 6 for group in groups)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_sampling_with_the_reason(temperature: float, bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[:, 0] = -torch.inf
    uniform = torch.full((2,), 0.5, dtype=torch.float64)
    pick_tokens(logits, uniform, temperature=temperature, top_p=1.0)
    logits[1, 3] = bad
    with pytest.raises(NonFiniteError, match=r"^sampling: the model's logits .* lower policy\.optimizer\.lr"):
        pick_tokens(logits, uniform, temperature=temperature, top_p=1.0)
