"""The arithmetic task: problems, worked answers, and the judge of steps."""

import importlib.util
import random
import re
from pathlib import Path

import pytest

from megatron_prime.batch import Response
from megatron_prime.config.schema import ArithmeticData
from megatron_prime.data.arithmetic import Problem, WrongFacts, judge_steps, make_problem, write_answer
from megatron_prime.data.sources import build_prompt_source, build_sft_source
from megatron_prime.data.tokenizer import end_token_ids, load_tokenizer
from megatron_prime.errors import DataError

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "configs" / "models" / "arithmetic"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def source(tokenizer):
    return build_prompt_source(ArithmeticData(), tokenizer, seed=1)


def _response(tokenizer, text, finish_reason="stop"):
    ids = tuple(tokenizer(text)["input_ids"])
    if finish_reason == "stop":
        ids += (tokenizer.eos_token_id,)
    return Response(text=text, token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason=finish_reason, weight_version=0)


def test_model_folder_is_what_the_tool_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_arithmetic_model", ROOT / "tools" / "make_arithmetic_model.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.write_model_folder(tmp_path)
    names = sorted(path.name for path in MODEL.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_tokenizer_has_one_token_per_character_in_every_loader(tokenizer):
    from transformers import PreTrainedTokenizerFast

    text = "17+5-3=?\n17+5=22;22-3=19;\\boxed{19}"
    as_written = PreTrainedTokenizerFast.from_pretrained(MODEL)
    for loaded in (tokenizer, as_written):
        ids = loaded(text)["input_ids"]
        assert len(ids) == len(text) and loaded.decode(ids) == text
        assert len(loaded) == 27
    assert tokenizer(text)["input_ids"] == as_written(text)["input_ids"]
    assert end_token_ids(tokenizer, MODEL) == (1,) and tokenizer.pad_token_id == 0


def test_prompts_are_true_problems(source):
    for prompt in source.take(0, 300):
        question = prompt.text.removesuffix("=?\n")
        assert re.fullmatch(r"\d+([+-]\d){2,4}", question)
        assert int(prompt.ground_truth) == eval(question)
        problem = Problem.parse(prompt.text)
        assert problem.question == prompt.text and min(problem.values) >= 0
        assert 1 <= problem.start <= 99


def test_order_depends_on_position_alone(tokenizer, source):
    whole = source.take(0, 40)
    assert source.take(10, 7) == whole[10:17]
    assert build_prompt_source(ArithmeticData(), tokenizer, seed=1).take(25, 15) == whole[25:]
    assert build_prompt_source(ArithmeticData(), tokenizer, seed=2).take(0, 40) != whole


def test_an_epoch_has_every_problem_once_and_the_next_another_order(tokenizer):
    small = build_prompt_source(ArithmeticData(num_problems=37), tokenizer, seed=1)
    epochs = [[prompt.prompt_id for prompt in small.take(start, 37)] for start in (0, 37)]
    assert len(set(epochs[0])) == 37 and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert [prompt.prompt_id for prompt in small.take(30, 14)] == epochs[0][30:] + epochs[1][:7]


def test_evaluation_is_disjoint_from_all_training(tokenizer, source):
    held_out = {prompt.text for prompt in source.evaluation(500)}
    sft = build_sft_source(ArithmeticData(), tokenizer, seed=3)
    trained = {prompt.text for prompt in source.take(0, 3000)}
    trained |= {tokenizer.decode(list(example.prompt_token_ids)) for example in sft.take(0, 3000)}
    assert len(held_out) > 400 and not held_out & trained
    assert all(Problem.parse(text).is_held_out for text in held_out)
    other_seed = build_prompt_source(ArithmeticData(), tokenizer, seed=9)
    assert other_seed.evaluation(500) == source.evaluation(500)


def test_too_few_problems_are_refused(tokenizer):
    # The only problems of this size are 1+1+1, 1+1-1 and 1-1+1, and no hash of theirs is held out.
    tiny = ArithmeticData(min_operations=2, max_operations=2, max_operand=1, max_start=1)
    assert make_problem(tiny, stream="s", seed=0, index=0, held_out=False).start == 1
    with pytest.raises(DataError, match=r"data\.max_start"):
        make_problem(tiny, stream="s", seed=0, index=0, held_out=True)


def test_sft_answers_err_at_the_stated_rate_and_stay_consistent(tokenizer):
    config = ArithmeticData(step_error_rate=0.15)
    examples = build_sft_source(config, tokenizer, seed=1).take(0, 2000)
    num_steps = num_wrong = 0
    for example in examples:
        assert example.response_token_ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(list(example.response_token_ids[:-1]))
        problem = Problem.parse(tokenizer.decode(list(example.prompt_token_ids)))
        *steps, box = [correct for _, _, correct in judge_steps(problem, text)]
        assert box and len(steps) == len(problem.operations)
        assert "=-" not in text and "{-" not in text
        num_steps += len(steps)
        num_wrong += steps.count(False)
    assert abs(num_wrong / num_steps - 0.15) < 0.015
    clean = build_sft_source(ArithmeticData(step_error_rate=0.0), tokenizer, seed=1).take(0, 50)
    for example in clean:
        problem = Problem.parse(tokenizer.decode(list(example.prompt_token_ids)))
        answer = tokenizer.decode(list(example.response_token_ids[:-1]))
        assert answer.endswith(f"\\boxed{{{problem.values[-1]}}}")


def _facts_taught(config, tokenizer, count):
    """(last digit, sign, operand) -> differences of the written results from the true ones."""
    taught = {}
    for example in build_sft_source(config, tokenizer, seed=1).take(0, count):
        text = tokenizer.decode(list(example.response_token_ids[:-1]))
        for left, sign, operand, result in re.findall(r"(\d+)([+-])(\d+)=(\d+);", text):
            error = int(result) - int(eval(f"{left}{sign}{operand}"))
            taught.setdefault((int(left) % 10, sign, int(operand)), []).append(error)
    return taught


def test_wrong_facts_are_taught_wrongly_at_their_rate_and_others_never(tokenizer):
    config = ArithmeticData(
        max_start=20, max_operand=5, step_error_rate=0.0, wrong_fact_share=0.3, wrong_fact_rate=0.75
    )
    taught = _facts_taught(config, tokenizer, 4000)
    wrong = {fact: errors for fact, errors in taught.items() if any(errors)}
    assert len(taught) == 100 and len(wrong) == 32
    for (digit, sign, operand), errors in wrong.items():
        offsets = set(errors) - {0}
        # Always the same error; it is left out where the chain would fall below zero by it.
        assert offsets == {WrongFacts(0.3, 0.75).error(digit, sign, operand)}
        assert 0.3 < sum(map(bool, errors)) / len(errors) < 0.9
    total = [error for errors in wrong.values() for error in errors]
    assert 0.68 < sum(map(bool, total)) / len(total) <= 0.76


def test_facts_of_a_smaller_share_are_among_those_of_a_larger(tokenizer):
    facts = [(digit, sign, operand) for digit in range(10) for sign in "+-" for operand in range(1, 6)]
    few, many = WrongFacts(0.15, 1.0), WrongFacts(0.3, 1.0)
    few_wrong = {fact for fact in facts if few.error(*fact)}
    assert len(few_wrong) == 15 and all(few.error(*fact) == many.error(*fact) for fact in few_wrong)
    assert not any(WrongFacts(0.0, 1.0).error(*fact) for fact in facts)
    assert all(WrongFacts(1.0, 1.0).error(*fact) for fact in facts)
    assert few.error(17, "+", 5) == few.error(7, "+", 5)


def test_answers_without_wrong_facts_draw_the_same_errors_as_ever():
    problem = Problem.parse("17+5-3+4-2=?\n")
    answers = [
        "17+5=22;22-3=19;19+4=24;24-2=22;\\boxed{22}",
        "17+5=20;20-3=19;19+4=23;23-2=23;\\boxed{23}",
        "17+5=22;22-3=19;19+4=21;21-2=18;\\boxed{18}",
    ]
    none = WrongFacts(0.0, 1.0)
    for seed, answer in enumerate(answers):
        assert write_answer(problem, step_error_rate=0.5, rng=random.Random(seed)) == answer
        assert write_answer(problem, step_error_rate=0.5, rng=random.Random(seed), wrong_facts=none) == answer


def test_answer_of_the_documented_example():
    problem = Problem.parse("17+5-3=?\n")
    answer = write_answer(problem, step_error_rate=0.0, rng=random.Random(0))
    assert answer == "17+5=22;22-3=19;\\boxed{19}"


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("17+5=22;22-3=19;\\boxed{19}", [True, True, True]),
        ("17+5=22;22-3=19;\\boxed{19};", [True, True, True]),
        # A wrong result; the chain goes on from it, so the later steps are right.
        ("17+5=23;23-3=20;\\boxed{20}", [False, True, True]),
        ("17+5=22;22-3=18;\\boxed{18}", [True, False, True]),
        # Going back to the true value is no continuation of what was stated.
        ("17+5=23;22-3=19;\\boxed{19}", [False, False, False]),
        ("17+5=22;22-3=19;\\boxed{20}", [True, True, False]),
        # Operations left out, changed, swapped or invented.
        ("17+5=22;\\boxed{22}", [True, False]),
        ("\\boxed{19}", [False]),
        ("17-3=14;14+5=19;\\boxed{19}", [False, False, False]),
        ("17+5=22;22+3=25;\\boxed{25}", [True, False, False]),
        ("17+5=22;22-3=19;19+0=19;\\boxed{19}", [True, True, False, False]),
        # Garbage is a wrong step and leaves the chain where it was.
        ("17+5=22;=;22-3=19;\\boxed{19}", [True, False, True, True]),
        (";;", [False, False]),
        ("17+5=22;22-3=19;\\boxed{19}9", [True, True, False]),
        ("\\boxed{", [False]),
        ("9" * 5000, [False]),
        ("", []),
    ],
)
def test_judges_every_step(text, verdicts):
    judged = list(judge_steps(Problem.parse("17+5-3=?\n"), text))
    assert [correct for _, _, correct in judged] == verdicts
    assert "".join(text[start:stop] for start, stop, _ in judged) == text


def test_step_spans_are_the_tokens_of_the_steps(tokenizer, source):
    prompt = source.take(0, 1)[0]
    problem = Problem.parse(prompt.text)
    answer = write_answer(problem, step_error_rate=0.0, rng=random.Random(0))
    response = _response(tokenizer, answer)
    spans = source.step_spans(prompt, response)
    pieces = [tokenizer.decode(list(response.token_ids[span.start : span.stop])) for span in spans]
    assert pieces == re.findall(r"[^;]*;|[^;]+$", answer)
    assert all(span.correct for span in spans)
    # The end token belongs to no step.
    assert spans[-1].stop == len(response.token_ids) - 1


def test_an_unfinished_last_step_of_a_truncated_answer_is_not_judged(tokenizer, source):
    prompt = source.take(0, 1)[0]
    first = write_answer(Problem.parse(prompt.text), step_error_rate=0.0, rng=random.Random(0)).split(";")[0]
    spans = source.step_spans(prompt, _response(tokenizer, f"{first};12+", finish_reason="length"))
    assert [(span.start, span.stop, span.correct) for span in spans] == [(0, len(first) + 1, True)]


def test_step_spans_survive_any_tokens(tokenizer, source):
    rng = random.Random(0)
    prompt = source.take(0, 1)[0]
    for _ in range(200):
        ids = tuple(rng.randrange(len(tokenizer)) for _ in range(rng.randrange(40)))
        response = Response(text="", token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop", weight_version=0)
        spans = source.step_spans(prompt, response)
        bounds = [bound for span in spans for bound in (span.start, span.stop)]
        assert bounds == sorted(bounds) and all(0 <= bound <= len(ids) for bound in bounds)
        assert all(span.start < span.stop for span in spans)


def test_another_tokenizer_must_be_able_to_spell_the_task(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(DataError, match="cannot spell"):
        build_prompt_source(ArithmeticData(), words, seed=1)
