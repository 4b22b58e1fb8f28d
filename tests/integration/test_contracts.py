"""What `check` finds in parts of the user's own, one broken part at a time."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest

from megatron_prime.assembly.contracts import check_imports, check_sockets, own_parts
from megatron_prime.config import AnyConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
MODEL = f"model.path={ROOT / 'configs' / 'models' / 'arithmetic'}"
IMPORTS = """
import json, random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from megatron_prime import Prompt, PromptSourceBase, Verdict
"""
VERIFIER = """
class Base:
    def __init__(self, section):
        self.section = section
    def submit(self, prompt, response):
        future = Future()
        future.set_result(self.judge(prompt, response))
        return future
    def judge(self, prompt, response):
        return Verdict(status="fine", reward=float(response.text == prompt.ground_truth))
    def close(self):
        pass
"""
PROMPTS = """
class Base(PromptSourceBase):
    def __len__(self):
        return 40
    def prompt(self, index):
        return self.request.raw_prompt(f"{index}=?", prompt_id=f"n{index}", ground_truth=str(index))
    def evaluation(self, count):
        return [self.request.raw_prompt(f"{i}+0=?", prompt_id=f"e{i}", ground_truth=str(i)) for i in range(count)]
"""
LOGGER = """
class Base:
    def __init__(self, request):
        self.request = request
    def log(self, step, metrics):
        assert metrics and all(isinstance(value, float) for value in metrics.values())
    def close(self):
        pass
"""

VERIFIERS = {
    "pass": None,
    "def __init__(self, section): raise KeyError('api key')": "raised KeyError: 'api key' (",
    "close = None": "returned has no close; submit must return",
    "def submit(self, prompt, response): return self.judge(prompt, response)": (
        "answer '': submit returned a Verdict, not a concurrent.futures.Future; submit must return"
    ),
    "def judge(self, prompt, response): return response.text[0]": "answer '': submit raised IndexError",
    "def judge(self, prompt, response): return True": "answer '': the verdict is a bool, not a Verdict",
    "def judge(self, prompt, response): return Verdict(status='fine', reward=-1.0)": (
        "answer '': the verdict has reward -1.0; it must be a number from 0 to 1, or None"
    ),
    "def judge(self, prompt, response): return Verdict(status='x', reward=random.random())": "answer '': once x (",
}
PROMPT_SOURCES = {
    "pass": None,
    "def __init__(self, request): raise OSError('no such bucket')": "raised OSError: no such bucket (",
    "take = None": "returned has no take",
    "def __len__(self): return 0": "has no prompts",
    "def prompt(self, index): return f'{index}=?'": "take(0, 16): item 0 is a str; give megatron_prime.Prompt",
    "def prompt(self, index): return replace(super().prompt(index), prompt_id='n')": (
        "take gives several prompts of an epoch the prompt_id 'n'; give each its own"
    ),
    "def prompt(self, index): return replace(super().prompt(index), ability='law')": (
        "prompts have the ability 'law', which data.abilities does not name; add it there"
    ),
    "def prompt(self, index): return super().prompt(random.randrange(10**6))": (
        "take(0, 16) and take(position, 1) one by one give other prompts; a prompt must depend on its position alone"
    ),
    "def __init__(self, request): super().__init__(replace(request, seed=random.randrange(10**6)))": (
        "two sources made with equal requests give other prompts; take all randomness from the request's seed"
    ),
    "def take(self, position, count): return [self.prompt(i) for i in range(position, min(position + count, 40))]": (
        "take(39, 2) gave 1 prompts; begin the next epoch where one ends"
    ),
    "evaluation = PromptSourceBase.evaluation": "the source has no held-out prompts; define evaluation, or set",
    "def evaluation(self, count): return random.sample(super().evaluation(1000), count)": (
        "evaluation gives other prompts the second time; they must always be the same"
    ),
    "def evaluation(self, count): return super().evaluation(1) * count": (
        "evaluation gives several prompts of an epoch the prompt_id 'e0'; give each its own"
    ),
}
LOGGERS = {
    "pass": None,
    "def __init__(self): pass": "raised TypeError: ",
    "log = 3": "returned has no log; return an object with log(step, metrics) and close()",
    "def log(self, step, metrics): metrics['policy/loss']": "raised KeyError: 'policy/loss' (",
    "def close(self): raise OSError('no server')": "raised OSError: no server (",
    "def __init__(self, request): (request.folder / 'metrics.csv').open('x')": (
        ", in the folder of an earlier run, raised FileExistsError: "
    ),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module with a sound part that is changed in one thing; returns its import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def own(base: str, change: str) -> str:
        module = f"own_part_{uuid4().hex}"
        (tmp_path / f"{module}.py").write_text(f"{IMPORTS}{base}\nclass Mine(Base):\n    {change}\n")
        return f"{module}:Mine"

    return own


def config_with(*overrides: str) -> AnyConfig:
    return load_config(ROOT / "configs" / "arithmetic.yaml", [MODEL, *overrides])


def assert_says(problems: list[str], key: str, complaint: str | None) -> None:
    if complaint is None:
        assert problems == []
        return
    assert problems and all(problem.startswith(f"{key}: ") and ";" in problem for problem in problems), problems
    assert any(complaint in problem for problem in problems), problems


@pytest.mark.parametrize("change", VERIFIERS)
def test_verifiers(own, change: str) -> None:
    config = config_with(f"verifier.factory={own(VERIFIER, change)}")
    assert_says(check_sockets(config), "verifier.factory", VERIFIERS[change])


@pytest.mark.parametrize("change", PROMPT_SOURCES)
def test_prompt_sources(own, change: str) -> None:
    config = config_with("data.kind=own", f"data.factory={own(PROMPTS, change)}", "data.max_prompt_tokens=16")
    assert_says(check_sockets(config), "data.factory", PROMPT_SOURCES[change])


@pytest.mark.parametrize("change", LOGGERS)
def test_metrics_loggers(own, change: str) -> None:
    config = config_with(f"run.loggers=[tensorboard, '{own(LOGGER, change)}']")
    assert_says(check_sockets(config), "run.loggers", LOGGERS[change])


def test_a_verifier_is_tried_with_the_prompts_of_the_run(own, tmp_path) -> None:
    # It takes its truth for JSON, as that of these rows is and that of made-up ones would not be.
    reads_json = "def judge(self, p, r): return Verdict(status='fine', reward=float(json.loads(p.ground_truth)['x']))"
    truth = {"reward_model": {"ground_truth": '{"x": 1}'}, "prompt": [{"role": "user", "content": "1=?"}]}
    rows = [truth | {"ability": "math"}] * 3 + [{"not": "read"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verifier = f"verifier.factory={own(VERIFIER, reads_json)}"
    files = f"data={{kind: files, template: raw, train: [{tmp_path / 'rows.jsonl'}]}}"
    assert check_sockets(config_with(verifier, files)) == []
    # The truth of an arithmetic problem is a number.
    assert_says(check_sockets(config_with(verifier)), "verifier.factory", "submit raised TypeError")
    mine = [f"data.factory={own(PROMPTS, 'pass')}", "data.kind=own", "data.max_prompt_tokens=16"]
    assert_says(check_sockets(config_with(verifier, *mine)), "verifier.factory", "submit raised TypeError")


def test_many_problems_of_one_part_are_counted(own) -> None:
    config = config_with(f"verifier.factory={own(VERIFIER, 'def judge(self, prompt, response): return None')}")
    problems = check_sockets(config)
    assert len(problems) == 4
    assert problems[-1].endswith("and 9 more of this kind; correct these first")


def test_parts_of_all_sockets_are_found_by_their_keys(own) -> None:
    config = config_with("verifier.factory=a:b", "data.kind=own", "data.factory=c:d", "run.loggers=[wandb, e:f, g:h]")
    assert own_parts(config) == [
        ("data.factory", "c:d"),
        ("run.loggers", "e:f"),
        ("run.loggers", "g:h"),
        ("verifier.factory", "a:b"),
    ]
    assert [problem.split(":")[0] for problem in check_imports(config)] == [key for key, _ in own_parts(config)]
    # What cannot be imported is not tried.
    assert check_sockets(config) == check_imports(config)
    assert own_parts(load_config(ROOT / "configs" / "arithmetic_sft.yaml")) == []


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_whose_package_is_missing_says_how_to_install_it() -> None:
    assert check_sockets(config_with("run.loggers=[wandb]")) == [
        "run.loggers: wandb is not installed; pip install 'megatron-prime[wandb]', or leave it out"
    ]
