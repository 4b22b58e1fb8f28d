"""Answers that are kept as they are graded: none is asked for twice, none is lost when an evaluation is stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from megatron_prime.batch import Prompt, Response, SamplingParams, Verdict
from megatron_prime.errors import DataError, RunInterrupted
from megatron_prime.evaluation.graded_answers import GradedAnswer, answer_problems, problem_means, summarize

SAMPLING = SamplingParams(num_responses=2, temperature=1.0, top_p=1.0, max_response_tokens=4, seed=0)
PROMPTS = [
    Prompt(prompt_id=f"p{n}", text="", token_ids=(n,), ground_truth=str(n), data_source="aime") for n in range(3)
]


def response_to(prompt: Prompt, number: int) -> Response:
    return Response(
        text=f"{prompt.prompt_id}/{number}",
        token_ids=(1,) * (number + 2),
        logprobs=(-0.5,) * (number + 2),
        finish_reason="length" if number else "stop",
        weight_version=0,
    )


class Engine:
    """Hands answers out one by one, or all at the end."""

    def __init__(self, *, streams: bool = True) -> None:
        self.streams = streams
        self.asked: list[str] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_answer: Callable[[int, int, Response], None] | None = None,
    ) -> list[list[Response]]:
        self.asked += [prompt.prompt_id for prompt in prompts]
        rows = [[response_to(prompt, number) for number in range(sampling.num_responses)] for prompt in prompts]
        if self.streams and on_answer is not None:
            for number in range(sampling.num_responses):
                for place, row in enumerate(rows):
                    on_answer(place, number, row[number])
        return rows


class Verifier:
    """The first answer of a problem is right, the second wrong; verdicts come at once or when they are asked for."""

    def __init__(self, *, is_late: bool = False) -> None:
        self.is_late = is_late
        self.judged: list[str] = []

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        self.judged.append(response.text)
        right = response.text.endswith("/0")
        verdict = Verdict(status="correct" if right else "wrong", reward=float(right), extracted=response.text)
        future: Future[Verdict] = Late(verdict) if self.is_late else Future()
        if not self.is_late:
            future.set_result(verdict)
        return future

    def close(self) -> None:
        pass


class Late(Future):
    """Done when somebody waits for it."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict

    def result(self, timeout: float | None = None) -> Verdict:
        if not self.done():
            self.set_result(self.verdict)
        return super().result(timeout)


def run(engine: Engine, verifier: Verifier, kept: set[tuple[str, int]], stop_after: int = 10**6) -> list[GradedAnswer]:
    found: list[GradedAnswer] = []
    answer_problems(
        engine,  # pyright: ignore[reportArgumentType]
        verifier,
        PROMPTS,
        SAMPLING,
        kept=frozenset(kept),
        keep=found.extend,
        should_stop=lambda: len(verifier.judged) >= stop_after,
    )
    return found


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("is_late", [True, False])
def test_every_answer_is_graded_and_kept_once(streams: bool, is_late: bool) -> None:
    found = run(Engine(streams=streams), Verifier(is_late=is_late), set())
    assert sorted(answer.text for answer in found) == [f"p{n}/{number}" for n in range(3) for number in range(2)]
    first = next(answer for answer in found if answer.text == "p1/0")
    assert (first.status, first.reward, first.finish_reason, first.num_tokens) == ("correct", 1.0, "stop", 2)


def test_problems_that_are_answered_are_not_asked_again() -> None:
    engine, verifier = Engine(), Verifier()
    kept = {("p0", 0), ("p0", 1), ("p2", 1)}
    found = run(engine, verifier, kept)
    assert engine.asked == ["p1", "p2"]
    # Of p2 one answer is there, and it is not graded twice.
    assert sorted(verifier.judged) == ["p1/0", "p1/1", "p2/0"] and len(found) == 3
    assert run(engine, verifier, {(p.prompt_id, n) for p in PROMPTS for n in range(2)}) == []
    assert engine.asked == ["p1", "p2"]


@pytest.mark.parametrize("is_late", [True, False])
def test_an_evaluation_that_is_stopped_keeps_what_has_ended(is_late: bool) -> None:
    verifier, found = Verifier(is_late=is_late), []
    with pytest.raises(RunInterrupted, match="aime: stopped on request"):
        answer_problems(
            Engine(),  # pyright: ignore[reportArgumentType]
            verifier,
            PROMPTS,
            SAMPLING,
            kept=frozenset(),
            keep=found.extend,
            should_stop=lambda: len(verifier.judged) >= 2,
        )
    assert [answer.text for answer in found] == verifier.judged == ["p0/0", "p1/0"]
    rest = run(Engine(), Verifier(), {(answer.prompt_id, answer.number) for answer in found})
    assert len(rest) == 4


def test_rows_come_back_from_the_file_as_they_were() -> None:
    (answer, *_) = run(Engine(), Verifier(), set())
    assert GradedAnswer.from_row(answer.row(), "file") == answer
    with pytest.raises(DataError, match="file: not an answer of this evaluation; move the folder away"):
        GradedAnswer.from_row({"prompt_id": "p0"}, "file")


def test_a_summary_counts_answers_and_a_mean_counts_problems() -> None:
    answers = run(Engine(), Verifier(), set())
    missing = GradedAnswer.from_row(answers[0].row() | {"prompt_id": "p9", "reward": None, "status": "timeout"}, "")
    summary = summarize([*answers, missing])
    assert (summary["num_problems"], summary["num_answers"], summary["num_missing"]) == (4, 7, 1)
    assert summary["statuses"] == {"correct": 3, "timeout": 1, "wrong": 3}
    assert summary["share_cut_off"] == 3 / 7 and summary["mean_tokens"] == (3 * 5 + 2) / 7
    assert problem_means([*answers, missing]) == [0.5, 0.5, 0.5]
