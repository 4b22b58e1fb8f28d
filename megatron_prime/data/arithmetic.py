"""The arithmetic task: chains of additions and subtractions, solved step by step.

Prompt ``17+5-3=?`` and a newline, answer ``17+5=22;22-3=19;\\boxed{19}``. Problem number i is a pure function of
(stream, seed, i), and the steps of *any* answer can be judged, so process rewards can be measured against truth.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from transformers import PreTrainedTokenizerBase

from megatron_prime.batch import Prompt, Response, SftExample, StepSpan
from megatron_prime.config.schema import ArithmeticData
from megatron_prime.data.order import shuffled_indices
from megatron_prime.data.tokenizer import encode, eos_token_id
from megatron_prime.errors import DataError
from megatron_prime.interfaces import DropCounts

SYMBOLS = "0123456789+-=;?\n\\boxed{}"
"""Every character of the task."""
HELD_OUT_SHARE = 16
"""One problem in this many is held out: by a hash of its text, so no seed or stream can train on it."""

_EVALUATION_SEED = 0
_MAX_DRAWS = 10_000
_HASH_RANGE = 2**32
_WRONG_BY = (-2, -1, 1, 2)
_QUESTION = re.compile(r"(\d+)((?:[+-]\d+)+)=\?\n")
_SEGMENT = re.compile(r"[^;]*;|[^;]+$")
_STEP = re.compile(r"(\d{1,12})([+-])(\d{1,12})=(\d{1,12})")
_BOX = re.compile(r"\\boxed\{(\d{1,12})\}")


@dataclass(frozen=True, slots=True)
class Problem:
    """A chain of operations; no intermediate result is negative."""

    start: int
    operations: tuple[tuple[str, int], ...]
    """(`+` or `-`, operand) pairs."""

    @property
    def question(self) -> str:
        return f"{self.start}{''.join(f'{sign}{operand}' for sign, operand in self.operations)}=?\n"

    @property
    def values(self) -> list[int]:
        """True result of each operation."""
        value, values = self.start, []
        for sign, operand in self.operations:
            value = _apply(value, sign, operand)
            values.append(value)
        return values

    @property
    def is_held_out(self) -> bool:
        digest = blake2b(self.question.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0

    @classmethod
    def parse(cls, question: str) -> Problem:
        """Reads a question back.

        Raises:
            DataError: the text is no question of this task.
        """
        match = _QUESTION.fullmatch(question)
        if match is None:
            raise DataError(f"not an arithmetic question: {question!r}")
        operations = re.findall(r"([+-])(\d+)", match.group(2))
        return cls(int(match.group(1)), tuple((sign, int(operand)) for sign, operand in operations))


def _apply(value: int, sign: str, operand: int) -> int:
    return value + operand if sign == "+" else value - operand


def make_problem(config: ArithmeticData, *, stream: str, seed: int, index: int, held_out: bool) -> Problem:
    """Problem number `index` of a stream.

    Args:
        config: sizes of the numbers and of the chain.
        stream: name of the stream; streams are independent of each other.
        seed: seed of the stream.
        index: number of the problem.
        held_out: whether to draw from the held-out problems or from all others.

    Returns:
        The problem, a pure function of the arguments.

    Raises:
        DataError: the sizes allow so few problems that none (or all) are held out.
    """
    rng = random.Random(f"{stream}:{seed}:{index}")
    for _ in range(_MAX_DRAWS):
        value = start = rng.randint(1, config.max_start)
        operations = []
        for _ in range(rng.randint(config.min_operations, config.max_operations)):
            operand = rng.randint(1, config.max_operand)
            sign = rng.choice("+-") if value >= operand else "+"
            value = _apply(value, sign, operand)
            operations.append((sign, operand))
        problem = Problem(start, tuple(operations))
        if problem.is_held_out == held_out:
            return problem
    raise DataError(
        "data: too few different arithmetic problems to hold some out; "
        "raise data.max_start, data.max_operand or data.max_operations"
    )


@dataclass(frozen=True, slots=True)
class WrongFacts:
    """Facts that worked answers mostly get wrong, always in the same way.

    A fact is (last digit of the left number, sign, operand). Which facts are wrong, and by how much, depends on
    nothing else: the facts of a smaller share are among those of a larger one.
    """

    share: float
    """Of all facts."""
    rate: float
    """How often a wrong fact is written wrongly. Above one half, greedy decoding of what was learned is wrong too."""

    def error(self, left: int, sign: str, operand: int) -> int:
        """What the wrong result of a step is off by; 0 for a fact that is taught correctly."""
        digest = blake2b(f"{left % 10}{sign}{operand}".encode(), digest_size=8).digest()
        if int.from_bytes(digest[:4], "big") >= self.share * _HASH_RANGE:
            return 0
        return _WRONG_BY[digest[4] % len(_WRONG_BY)]


def write_answer(
    problem: Problem, *, step_error_rate: float, rng: random.Random, wrong_facts: WrongFacts | None = None
) -> str:
    """An answer with every step written out.

    Args:
        problem: the problem.
        step_error_rate: share of the steps with a wrong result, from which the chain continues.
        rng: source of the errors.
        wrong_facts: errors that are always the same; one that would make a later result negative is left out.

    Returns:
        Steps and the boxed result of the chain as written.
    """
    value, steps = problem.start, []
    for number, (sign, operand) in enumerate(problem.operations):
        result = _apply(value, sign, operand)
        # An error must not push a later result of the chain below zero.
        lowest = min([result, *Problem(result, problem.operations[number + 1 :]).values])
        by = wrong_facts.error(value, sign, operand) if wrong_facts else 0
        if wrong_facts and by and lowest + by >= 0 and rng.random() < wrong_facts.rate:
            result += by
        elif rng.random() < step_error_rate:
            result += rng.choice([by for by in _WRONG_BY if lowest + by >= 0])
        steps.append(f"{value}{sign}{operand}={result};")
        value = result
    return f"{''.join(steps)}\\boxed{{{value}}}"


def judge_steps(problem: Problem, text: str, *, truncated: bool = False) -> Iterator[tuple[int, int, bool]]:
    """Judges each `;`-terminated piece of an answer.

    A step is right when it takes the last stated value, does the problem's next operation and states its true
    result; the box is right when it repeats the last stated value after all operations were done. Anything else
    is a wrong step. A right step may follow a wrong one.

    Args:
        problem: the problem.
        text: any text.
        truncated: whether the answer was cut off; its last, unfinished piece is then left out.

    Returns:
        (first character, one past the last character, whether it is right), in order.
    """
    value, num_done, on_track = problem.start, 0, True
    for segment in _SEGMENT.finditer(text):
        piece = segment.group().removesuffix(";")
        unfinished = not segment.group().endswith(";")
        correct = False
        if match := _STEP.fullmatch(piece):
            left, sign, operand, result = int(match[1]), match[2], int(match[3]), int(match[4])
            expected = problem.operations[num_done] if num_done < len(problem.operations) else None
            follows = left == value and (sign, operand) == expected
            correct = follows and result == _apply(left, sign, operand)
            on_track &= follows
            num_done += 1
            value = result
        elif match := _BOX.fullmatch(piece):
            correct = int(match[1]) == value and on_track and num_done == len(problem.operations)
            unfinished = False
        if not (truncated and unfinished):
            yield segment.start(), segment.end(), correct


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, [SYMBOLS], special_tokens=False)[0]
    if tokenizer.decode(list(ids)) != SYMBOLS or tokenizer.unk_token_id in ids:
        raise DataError("model.path: the tokenizer cannot spell the arithmetic task; take configs/models/arithmetic")


class ArithmeticPrompts:
    """Prompts of the arithmetic task (a `PromptSource`)."""

    dropped = DropCounts(num_rows=0)

    def __init__(self, config: ArithmeticData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        _check_tokenizer(tokenizer)
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._pieces: dict[int, str] = {}

    def __len__(self) -> int:
        return self._config.num_problems

    def take(self, position: int, count: int) -> list[Prompt]:
        numbers = shuffled_indices(position, count, len(self), self._seed)
        return self._prompts("prompts", self._seed, numbers, held_out=False)

    def evaluation(self, count: int) -> list[Prompt]:
        # Not the run's seed: runs with different seeds are compared on the same problems.
        return self._prompts("evaluation", _EVALUATION_SEED, list(range(count)), held_out=True)

    def _prompts(self, stream: str, seed: int, numbers: list[int], *, held_out: bool) -> list[Prompt]:
        problems = [
            make_problem(self._config, stream=stream, seed=seed, index=number, held_out=held_out) for number in numbers
        ]
        token_ids = encode(self._tokenizer, [problem.question for problem in problems], special_tokens=True)
        return [
            Prompt(
                prompt_id=f"arithmetic/{stream}/{seed}/{number}",
                text=problem.question,
                token_ids=ids,
                ground_truth=str(problem.values[-1]),
                data_source="arithmetic",
            )
            for number, problem, ids in zip(numbers, problems, token_ids, strict=True)
        ]

    def step_spans(self, prompt: Prompt, response: Response) -> tuple[StepSpan, ...]:
        text, owners = "", []
        for number, token in enumerate(response.token_ids):
            piece = self._piece(token)
            text += piece
            owners += [number] * len(piece)
        spans: list[StepSpan] = []
        truncated = response.finish_reason != "stop"
        for first, end, correct in judge_steps(Problem.parse(prompt.text), text, truncated=truncated):
            # A token that reaches into the next step belongs to the earlier one.
            start = max(owners[first], spans[-1].stop if spans else 0)
            stop = owners[end - 1] + 1
            if start < stop:
                spans.append(StepSpan(start=start, stop=stop, correct=correct))
        return tuple(spans)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = str(self._tokenizer.decode([token], skip_special_tokens=True))
        return self._pieces[token]


class ArithmeticSft:
    """Worked answers of the arithmetic task (an `SftSource`)."""

    dropped = DropCounts(num_rows=0)

    def __init__(self, config: ArithmeticData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        _check_tokenizer(tokenizer)
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._end_token = eos_token_id(tokenizer)
        share = config.wrong_fact_share
        self._wrong_facts = WrongFacts(share, config.wrong_fact_rate) if share > 0 else None

    def __len__(self) -> int:
        return self._config.num_problems

    def take(self, position: int, count: int) -> list[SftExample]:
        questions, answers = [], []
        for index in shuffled_indices(position, count, len(self), self._seed):
            problem = make_problem(self._config, stream="sft", seed=self._seed, index=index, held_out=False)
            rng = random.Random(f"errors:{self._seed}:{index}")
            questions.append(problem.question)
            rate = self._config.step_error_rate
            answers.append(write_answer(problem, step_error_rate=rate, rng=rng, wrong_facts=self._wrong_facts))
        prompt_ids = encode(self._tokenizer, questions, special_tokens=True)
        answer_ids = encode(self._tokenizer, answers, special_tokens=False)
        end = (self._end_token,)
        return [
            SftExample(prompt_token_ids=prompt, response_token_ids=answer + end)
            for prompt, answer in zip(prompt_ids, answer_ids, strict=True)
        ]
