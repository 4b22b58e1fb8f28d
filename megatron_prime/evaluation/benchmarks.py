"""A finished model on published test sets: `megatron-prime evaluate MODEL --benchmarks ...`."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_prime.batch import Prompt, SamplingParams
from megatron_prime.config.schema import RolloutSection, VerifierSection, VllmSection
from megatron_prime.config.schema_verifier import CodeVerifierSection
from megatron_prime.data.row_formats import Question
from megatron_prime.data.templates import complete_messages, render
from megatron_prime.data.tokenizer import encode, load_tokenizer
from megatron_prime.errors import ConfigError, DataError
from megatron_prime.evaluation.graded_answers import GradedAnswer, answer_problems, problem_means, summarize
from megatron_prime.evaluation.options import EvaluationOptions
from megatron_prime.evaluation.registry import BENCHMARKS, Benchmark, load_benchmarks
from megatron_prime.evaluation.scores import mean_of_benchmarks
from megatron_prime.interfaces import Engine
from megatron_prime.observe.atomic_files import require_folder, write_atomically
from megatron_prime.observe.report import benchmark_table
from megatron_prime.observe.row_file import RowFile
from megatron_prime.rollout.prompts import lack_of_room
from megatron_prime.verify.routing import RoutingVerifier, build_verifier
from megatron_prime.watch.interrupt import stop_requests
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.conversion import as_hf_folder

_MAX_ROWS = 64
_MAX_VLLM_ROWS = 256
_CPU_CACHE_GIB = 2.0
_GPU_SHARE = 0.85
_TEST_SECONDS = 6.0
_PROGRAM_SECONDS = 120.0
_LINE_SECONDS = 10.0
_log = logging.getLogger(__name__)


LoadEngine = Callable[[str, str, RolloutSection, int], AbstractContextManager[tuple[Engine, str]]]
"""From folder, dtype, how to sample and CPU threads to an engine with the folder's weights and their checksum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A benchmark ready to be answered."""

    benchmark: Benchmark
    prompts: list[Prompt]
    sampling: SamplingParams

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.token_ids) for prompt in self.prompts)


def evaluate_benchmarks(options: EvaluationOptions, load_engine: LoadEngine) -> Mapping[str, Any]:
    """Answers and grades benchmarks, in this process alone, and writes results.json and results.txt.

    Args:
        options: what to evaluate, and how.
        load_engine: called once everything that can be known to be wrong has been looked at.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: options that contradict each other, the model, or what the output folder already holds.
        DataError: see `load_benchmarks`; the output folder cannot be written.
        RunInterrupted: a stop signal came; the answers so far are kept and the same call goes on.
    """
    questions = load_benchmarks(options.data, options.benchmarks)
    _check_sampling(options, list(questions))
    with as_hf_folder(options.model) as folder, stop_requests() as should_stop:
        tokenizer, architecture = load_tokenizer(folder), read_architecture(folder)
        tasks = [_task(options, tokenizer, name, rows) for name, rows in questions.items()]
        _check_lengths(tasks, architecture.max_position_embeddings)
        require_folder(Path(options.output))
        section = _engine_section(options, tasks)
        abilities = {prompt.ability for task in tasks for prompt in task.prompts}
        limits = CodeVerifierSection(test_seconds=_TEST_SECONDS, total_seconds=_PROGRAM_SECONDS)
        graders = VerifierSection(num_workers=options.num_workers, code=limits)
        loaded = load_engine(folder, options.dtype, section, torch.get_num_threads())
        with (
            build_verifier(graders, abilities) as verifier,
            loaded as (engine, checksum),
        ):
            answers = {
                task.benchmark.name: _answer(options, task, engine, verifier, checksum, should_stop) for task in tasks
            }
    return _write_results(options, tasks, answers)


def _sampling(options: EvaluationOptions, benchmark: Benchmark) -> SamplingParams:
    """How a benchmark is answered."""

    def chosen(given: Any, published: Any) -> Any:
        return published if given is None else given

    return SamplingParams(
        num_responses=chosen(options.num_samples, benchmark.num_responses),
        temperature=chosen(options.temperature, benchmark.temperature),
        top_p=chosen(options.top_p, benchmark.top_p),
        max_response_tokens=chosen(options.max_tokens, benchmark.max_response_tokens),
        seed=options.seed,
    )


def _check_sampling(options: EvaluationOptions, names: Sequence[str]) -> None:
    problems = []
    for name in names:
        sampling = _sampling(options, BENCHMARKS[name])
        if sampling.temperature == 0 and sampling.num_responses > 1:
            problems.append(f"{name}: {sampling.num_responses} greedy answers are all the same; give --temperature")
    if problems:
        raise ConfigError(problems)


def _task(
    options: EvaluationOptions, tokenizer: PreTrainedTokenizerBase, name: str, rows: list[tuple[str, Question]]
) -> _Task:
    chosen = rows[: options.num_problems]
    texts = []
    for _, question in chosen:
        messages = complete_messages(
            question.messages, ability=question.ability, system_prompt=options.system_prompt, task_suffix=True
        )
        texts.append(render(tokenizer, messages, options.template))
    prompts = [
        Prompt(
            prompt_id=prompt_id,
            text=text,
            token_ids=ids,
            ground_truth=question.ground_truth,
            ability=question.ability,
            data_source=name,
            extra_info=question.extra_info,
        )
        for (prompt_id, question), text, ids in zip(
            chosen, texts, encode(tokenizer, texts, special_tokens=options.template == "raw"), strict=True
        )
    ]
    return _Task(benchmark=BENCHMARKS[name], prompts=prompts, sampling=_sampling(options, BENCHMARKS[name]))


def _check_lengths(tasks: Sequence[_Task], limit: int) -> None:
    lacks = [
        lack_of_room(task.benchmark.name, task.longest, task.sampling.max_response_tokens, limit) for task in tasks
    ]
    if problems := [lack for lack in lacks if lack is not None]:
        raise ConfigError(problems)


def _engine_section(options: EvaluationOptions, tasks: Sequence[_Task]) -> RolloutSection:
    on_gpu = torch.cuda.is_available()
    vllm = VllmSection(
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=max(task.longest + task.sampling.max_response_tokens for task in tasks),
        max_num_seqs=_MAX_VLLM_ROWS,
        kv_cache_gib=None if on_gpu else _CPU_CACHE_GIB,
        gpu_memory_utilization=_GPU_SHARE,
    )
    return RolloutSection(engine=options.engine, num_prompts=1, max_batch_size=_MAX_ROWS, vllm=vllm)


def _answer(
    options: EvaluationOptions,
    task: _Task,
    engine: Engine,
    verifier: RoutingVerifier,
    checksum: str,
    should_stop: Callable[[], bool],
) -> list[GradedAnswer]:
    """All answers to a benchmark's problems, those of earlier calls among them."""
    name, count = task.benchmark.name, task.sampling.num_responses
    file = RowFile(Path(options.output) / f"{name}.jsonl")
    _claim(Path(options.output) / f"{name}.settings.json", _settings(options, task, checksum))
    before = [GradedAnswer.from_row(row, str(file.path)) for row in file.read()]
    kept = {(answer.prompt_id, answer.number): answer for answer in before}
    total, last_line = len(task.prompts) * count, -math.inf

    def keep(answers: list[GradedAnswer]) -> None:
        nonlocal last_line
        file.append(answer.row() for answer in answers)
        kept.update({(answer.prompt_id, answer.number): answer for answer in answers})
        if time.monotonic() - last_line > _LINE_SECONDS or len(kept) == total:
            last_line = time.monotonic()
            _log.info("%s: %d of %d answers", name, len(kept), total)

    answer_problems(
        engine, verifier, task.prompts, task.sampling, kept=frozenset(kept), keep=keep, should_stop=should_stop
    )
    return [kept[prompt.prompt_id, number] for prompt in task.prompts for number in range(count)]


def _settings(options: EvaluationOptions, task: _Task, checksum: str) -> dict[str, Any]:
    """What all answers of a benchmark must have in common."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in task.prompts:
        digest.update(repr((prompt.prompt_id, prompt.text, prompt.ground_truth)).encode(errors="surrogatepass"))
    return {
        "weights": checksum,
        "problems": digest.hexdigest(),
        "num_problems": len(task.prompts),
        "engine": options.engine,
        "dtype": options.dtype,
        "template": options.template,
        "system_prompt": options.system_prompt,
        "num_samples": task.sampling.num_responses,
        "temperature": task.sampling.temperature,
        "top_p": task.sampling.top_p,
        "max_tokens": task.sampling.max_response_tokens,
        "seed": task.sampling.seed,
    }


def _claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a benchmark, or finds them there."""
    if not path.exists():
        write_atomically(path, json.dumps(dict(settings), indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key} (was {before[key]!r}, now {settings[key]!r})" for key in settings if before[key] != settings[key]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the settings of an evaluation; move the folder away") from error
    if differing:
        raise ConfigError(f"{path}: holds answers given otherwise: {', '.join(differing)}; choose another --output")


def _write_results(
    options: EvaluationOptions, tasks: Sequence[_Task], answers: Mapping[str, list[GradedAnswer]]
) -> Mapping[str, Any]:
    output = Path(options.output)
    benchmarks = {
        task.benchmark.name: {
            "title": task.benchmark.title,
            "num_published": task.benchmark.num_problems,
            **summarize(answers[task.benchmark.name]),
            "settings": json.loads((output / f"{task.benchmark.name}.settings.json").read_text(encoding="utf-8")),
        }
        for task in tasks
    }
    means = {name: problem_means(rows) for name, rows in answers.items()}
    results = {
        "model": os.path.normpath(options.model),
        "average": mean_of_benchmarks(means).row() if len(means) > 1 else None,
        "benchmarks": benchmarks,
    }
    write_atomically(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(output / "results.txt", benchmark_table(results))
    return results
