"""Prompts of the user's own: what a factory is given, the base class, and what a source may not do to a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prime.batch import Response, StepSpan
from megatron_prime.config.schema import OwnData
from megatron_prime.data.own import OwnPrompts, PromptRequest, PromptSourceBase, make_own_prompts
from megatron_prime.data.templates import PRIME_SYSTEM_PROMPT, TASK_SUFFIXES
from megatron_prime.data.tokenizer import load_tokenizer
from megatron_prime.errors import DataError

CONFIG = OwnData(factory="mine:make", max_prompt_tokens=8)
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parents[3] / "configs" / "models" / "arithmetic")


@pytest.fixture
def request_(tokenizer) -> PromptRequest:
    return PromptRequest(tokenizer=tokenizer, options={"size": 5}, seed=3, max_prompt_tokens=8)


class Numbers(PromptSourceBase):
    def __len__(self):
        return self.request.options["size"]

    def prompt(self, index):
        return self.request.raw_prompt(f"{index}=?", prompt_id=f"n{index}", ground_truth=str(index))


class Listed:
    """Has what a source needs and nothing else."""

    def __init__(self, prompts, length=3):
        self.prompts, self.length = prompts, length

    def __len__(self):
        return self.length

    def take(self, position, count):
        return self.prompts

    def evaluation(self, count):
        return self.prompts


def test_a_raw_prompt_is_the_text_and_its_tokens(request_, tokenizer) -> None:
    prompt = request_.raw_prompt("1+2=?", prompt_id="a", ground_truth="3", extra_info={"level": 1})
    assert (prompt.text, prompt.ground_truth, prompt.ability) == ("1+2=?", "3", "math")
    assert tokenizer.decode(list(prompt.token_ids)) == "1+2=?" and prompt.extra_info == {"level": 1}


def test_a_chat_prompt_has_the_system_prompt_suffix_and_template_of_prime(request_, tokenizer, monkeypatch) -> None:
    with pytest.raises(DataError, match="no chat template"):
        request_.chat_prompt("1+2=?", prompt_id="a", ground_truth="3")
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    prompt = request_.chat_prompt("1+2=?", prompt_id="a", ground_truth="3", ability="code")
    assert prompt.text == f"<system>{PRIME_SYSTEM_PROMPT}<user>1+2=?{TASK_SUFFIXES['code']}<answer>"
    assert prompt.ability == "code"


def test_the_base_class_shuffles_every_epoch_by_the_seed(request_) -> None:
    source = Numbers(request_)
    epochs = [[prompt.prompt_id for prompt in source.take(first, 5)] for first in (0, 5, 10)]
    assert all(sorted(epoch) == ["n0", "n1", "n2", "n3", "n4"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [prompt.prompt_id for prompt in source.take(3, 4)] == [*epochs[0][3:], *epochs[1][:2]]
    prompt = source.prompt(0)
    response = Response(text="", token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
    assert source.step_spans(prompt, response) is None and source.dropped.num_dropped == 0
    with pytest.raises(DataError, match=r"no held-out prompts; define evaluation, or set evaluation.num_prompts=0"):
        source.evaluation(1)


def test_what_a_factory_makes_is_found_by_name_and_guarded(tokenizer, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_numbers.py").write_text(
        "from megatron_prime import PromptSourceBase\n"
        "class Numbers(PromptSourceBase):\n"
        "    def __len__(self): return self.request.options['size']\n"
        "    def prompt(self, index):\n"
        "        return self.request.raw_prompt(f'{index}=?', prompt_id=f'n{index}', ground_truth='0')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = OwnData(factory="own_numbers:Numbers", options={"size": 4}, max_prompt_tokens=3)
    source = make_own_prompts(config, tokenizer, seed=1)
    assert len(source) == 4 and len(source.take(2, 7)) == 7
    with pytest.raises(DataError, match=r"own_numbers:Numbers: .* above data.max_prompt_tokens = 2; leave it out"):
        make_own_prompts(replace(config, max_prompt_tokens=2), tokenizer, seed=1).take(0, 1)


def test_only_three_methods_are_needed_and_the_other_two_are_used_where_they_are(request_, tokenizer) -> None:
    prompts = [request_.raw_prompt("1=?", prompt_id="a", ground_truth="1")]
    response = Response(text="", token_ids=(5,), logprobs=(0.0,), finish_reason="stop", weight_version=0)
    source = OwnPrompts(Listed(prompts), CONFIG, tokenizer)
    assert (source.dropped.num_dropped, source.step_spans(prompts[0], response)) == (0, None)
    with_steps = Listed(prompts)
    spans = (StepSpan(start=0, stop=1, correct=True),)
    with_steps.step_spans = lambda prompt, response: spans
    assert OwnPrompts(with_steps, CONFIG, tokenizer).step_spans(prompts[0], response) == spans
    with pytest.raises(DataError, match="what mine:make returned has no __len__ and no evaluation"):
        OwnPrompts(SimpleNamespace(take=lambda position, count: []), CONFIG, tokenizer)
    with pytest.raises(DataError, match="mine:make has no prompts"):
        OwnPrompts(Listed(prompts, length=0), CONFIG, tokenizer)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (None, r"is a str; give megatron_prime.Prompt"),
        ({"prompt_id": ""}, "has prompt_id ''"),
        ({"prompt_id": 7}, "has prompt_id 7"),
        ({"token_ids": ()}, r"\(a\) has no token_ids of the tokenizer's"),
        ({"token_ids": (10**6,)}, r"\(a\) has no token_ids of the tokenizer's"),
        ({"token_ids": (-1,)}, r"\(a\) has no token_ids of the tokenizer's"),
        ({"token_ids": (1.5,)}, r"\(a\) has no token_ids of the tokenizer's"),
        ({"token_ids": (5,) * 9}, r"\(a\) has 9 tokens, above data.max_prompt_tokens = 8"),
        ({"ground_truth": 3}, r"\(a\) has ground_truth 3; give text"),
    ],
)
def test_what_is_no_usable_prompt_is_named(request_, tokenizer, fields, complaint) -> None:
    good = request_.raw_prompt("1=?", prompt_id="a", ground_truth="1")
    source = OwnPrompts(Listed(["1=?"] if fields is None else [replace(good, **fields)]), CONFIG, tokenizer)
    with pytest.raises(DataError, match=rf"^data.factory: mine:make: take\(0, 1\): item 0 {complaint}"):
        source.take(0, 1)
    with pytest.raises(DataError, match=rf"^data.factory: mine:make: evaluation\(1\): item 0 {complaint}"):
        source.evaluation(1)


def test_too_few_and_too_many_prompts_are_named(request_, tokenizer) -> None:
    good = request_.raw_prompt("1=?", prompt_id="a", ground_truth="1")
    source = OwnPrompts(Listed([good]), CONFIG, tokenizer)
    with pytest.raises(DataError, match=r"take\(4, 2\) gave 1 prompts; begin the next epoch where one ends"):
        source.take(4, 2)
    assert source.evaluation(3) == [good]
    with pytest.raises(DataError, match=r"evaluation\(1\) gave 2 prompts; give from 1 to 1, or set"):
        OwnPrompts(Listed([good, good]), CONFIG, tokenizer).evaluation(1)
    with pytest.raises(DataError, match=r"evaluation\(5\) gave 0 prompts"):
        OwnPrompts(Listed([]), CONFIG, tokenizer).evaluation(5)
