"""Benchmarks with an engine that knows every second answer: scores, what is kept, and what is refused beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_configs import make_start

from megatron_prime.batch import Prompt, Response, SamplingParams
from megatron_prime.config.schema import RolloutSection
from megatron_prime.errors import ConfigError
from megatron_prime.evaluation.benchmarks import evaluate_benchmarks
from megatron_prime.evaluation.options import EvaluationOptions

DATA = Path(__file__).resolve().parents[2] / "data" / "benchmarks"


class Knowing:
    """Answers with the truth in a box, every second time with something else."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.sampling: list[SamplingParams] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_answer: Callable[[int, int, Response], None] | None = None,
    ) -> list[list[Response]]:
        self.prompts += prompts
        self.sampling.append(sampling)
        return [
            [self._answer(prompt, number % 2 == 0) for number in range(sampling.num_responses)] for prompt in prompts
        ]

    def _answer(self, prompt: Prompt, right: bool) -> Response:
        text = rf"\boxed{{{prompt.ground_truth if right else 'no'}}}"
        return Response(text=text, token_ids=(1, 2, 3), logprobs=(-0.5,) * 3, finish_reason="stop", weight_version=0)


class Loader:
    """Stands where engines are made, and keeps what it was asked for."""

    def __init__(self, checksum: str = "abc") -> None:
        self.engine, self.checksum = Knowing(), checksum
        self.sections: list[RolloutSection] = []

    @contextmanager
    def __call__(self, folder: str, dtype: str, section: RolloutSection, threads: int) -> Iterator[tuple[Any, str]]:
        self.sections.append(section)
        yield self.engine, self.checksum


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "start"
    make_start("qwen3-0.6b", folder)
    return str(folder)


def options(model: str, output: Path, **changes: Any) -> EvaluationOptions:
    chosen: dict[str, Any] = {"benchmarks": ("aime24", "amc23"), "num_samples": 4, "temperature": 0.5}
    chosen |= {"max_tokens": 8, "num_workers": 1, "data": str(DATA), "output": str(output)} | changes
    return EvaluationOptions(model=model, **chosen)


def test_scores_are_of_what_the_engine_answered(model: str, tmp_path: Path) -> None:
    loader = Loader()
    results = evaluate_benchmarks(options(model, tmp_path), loader)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("aime24", "amc23"):
        found = results["benchmarks"][name]
        assert (found["num_problems"], found["num_answers"], found["num_missing"]) == (2, 8, 0)
        means = {key: score["value"] for key, score in found["scores"].items()}
        # Two of four answers are right: of two drawn at random both are wrong in one case of six.
        assert means["avg@4"] == 0.5 and means["pass@4"] == 1.0
        assert means["pass@2"] == pytest.approx(5 / 6)
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == 8
    assert results["average"]["value"] == 0.5
    assert "AIME" in (tmp_path / "results.txt").read_text()
    (section,) = loader.sections
    longest = max(len(prompt.token_ids) for prompt in loader.engine.prompts)
    assert section.vllm.max_model_len == longest + 8
    assert {sampling.temperature for sampling in loader.engine.sampling} == {0.5}


def test_answers_that_are_kept_are_not_sampled_again(model: str, tmp_path: Path) -> None:
    first = evaluate_benchmarks(options(model, tmp_path), Loader())
    rows = (tmp_path / "aime24.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "aime24.jsonl").write_text("".join(rows[:5]))
    loader = Loader()
    assert evaluate_benchmarks(options(model, tmp_path), loader) == first
    assert [prompt.prompt_id for prompt in loader.engine.prompts] == ["aime24/1"]


@pytest.mark.parametrize(
    ("changes", "checksum", "message"),
    [
        ({"seed": 2}, "abc", r"seed \(was 1, now 2\); choose another --output"),
        ({"max_tokens": 9}, "abc", r"max_tokens \(was 8, now 9\)"),
        ({"num_problems": 1}, "abc", r"problems .*num_problems \(was 2, now 1\)"),
        ({}, "def", r"weights \(was 'abc', now 'def'\)"),
    ],
)
def test_answers_given_otherwise_are_not_mixed(
    model: str, tmp_path: Path, changes: dict[str, Any], checksum: str, message: str
) -> None:
    evaluate_benchmarks(options(model, tmp_path), Loader())
    with pytest.raises(ConfigError, match=message):
        evaluate_benchmarks(options(model, tmp_path, **changes), Loader(checksum))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "aime24: 4 greedy answers are all the same; give --temperature"),
        ({"max_tokens": 10**6}, "aime24: answers of 1000000 tokens after a prompt of"),
    ],
)
def test_what_cannot_work_is_said_before_an_engine_is_loaded(
    model: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    loader = Loader()
    with pytest.raises(ConfigError, match=message):
        evaluate_benchmarks(options(model, tmp_path, **changes), loader)
    assert loader.sections == [] and not list(tmp_path.iterdir())


def test_a_benchmarks_own_protocol_is_what_is_not_said_otherwise(model: str, tmp_path: Path) -> None:
    loader = Loader()
    chosen = options(model, tmp_path, benchmarks=("gsm8k",), num_samples=None, temperature=None, num_problems=1)
    evaluate_benchmarks(chosen, loader)
    (sampling,) = loader.engine.sampling
    assert (sampling.num_responses, sampling.temperature, sampling.max_response_tokens) == (1, 0.0, 8)
    assert len(loader.engine.prompts) == 1
