"""Files, inheritance, overrides and the way back to YAML."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prime.config import PrimeConfig, SftConfig, load_config, save_config, to_dict
from megatron_prime.config.schema import ArithmeticData, FileData
from megatron_prime.errors import ConfigError

MINIMAL = """
run: {name: test, num_steps: 3}
model: {path: somewhere}
data: {kind: arithmetic, max_start: 50}
rollout: {num_prompts: 4}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def prime(path: Path, *overrides: str) -> PrimeConfig:
    config = load_config(path, overrides)
    assert isinstance(config, PrimeConfig)
    return config


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_kind_is_prime_by_default_and_sft_on_request(tmp_path):
    assert prime(write(tmp_path, "a.yaml", MINIMAL)).kind == "prime"
    text = "kind: sft\nrun: {name: t, num_steps: 1}\nmodel: {path: m}\ndata: {kind: arithmetic}\n"
    sft = load_config(write(tmp_path, "b.yaml", text + "sft: {batch_size: 2, optimizer: {lr: 1e-3}}"))
    assert isinstance(sft, SftConfig)
    assert sft.sft.optimizer.lr == 1e-3


def test_bases_are_relative_to_their_file_and_later_files_win(tmp_path):
    write(tmp_path, "deep/one.yaml", MINIMAL + "prm: {beta: 0.1, num_minibatches: 3}\n")
    write(tmp_path, "deep/two.yaml", "base: one.yaml\nprm: {beta: 0.2}\n")
    write(tmp_path, "three.yaml", "advantage: {process_coef: 2}\nrun: {seed: 7}\n")
    path = write(tmp_path, "four.yaml", "base: [deep/two.yaml, three.yaml]\nrun: {seed: 9}\n")
    config = prime(path)
    assert (config.prm.beta, config.prm.num_minibatches) == (0.2, 3)
    assert (config.advantage.process_coef, config.run.seed, config.run.name) == (2.0, 9, "test")


def test_two_files_may_share_a_base_but_not_form_a_circle(tmp_path):
    write(tmp_path, "root.yaml", MINIMAL)
    write(tmp_path, "left.yaml", "base: root.yaml\nrun: {seed: 2}\n")
    write(tmp_path, "right.yaml", "base: root.yaml\nprm: {beta: 0.3}\n")
    config = prime(write(tmp_path, "both.yaml", "base: [left.yaml, right.yaml]\n"))
    assert (config.run.seed, config.prm.beta) == (2, 0.3)
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    (problem,) = problems_of(write(tmp_path, "b.yaml", "base: a.yaml\n"))
    assert "b.yaml -> a.yaml -> b.yaml" in problem


def test_a_section_of_another_kind_replaces_the_inherited_one(tmp_path):
    write(tmp_path, "base.yaml", MINIMAL)
    path = write(tmp_path, "a.yaml", "base: base.yaml\ndata: {kind: files, train: [x.jsonl]}\n")
    assert prime(path).data == FileData(train=["x.jsonl"])
    # Also where the new kind is named after its keys on the command line.
    overridden = prime(tmp_path / "base.yaml", "data.train=[y.json]", "data.kind=files")
    assert overridden.data == FileData(train=["y.json"])
    assert prime(tmp_path / "base.yaml", "data.max_operand=5").data == ArithmeticData(max_start=50, max_operand=5)


def test_overrides_are_yaml_values_and_win(tmp_path):
    path = write(tmp_path, "a.yaml", MINIMAL + "prm: {path: other}\n")
    config = prime(
        path,
        "prm.path=null",
        "prm.optimizer.lr=1e-4",
        "rollout.stop_token_ids=[1, 2]",
        "policy.dual_clip=3",
        "advantage.whiten=false",
        "run.name=a=b",
        "run.seed=1",
        "run.seed=2",
    )
    assert config.prm.path is None
    assert config.prm.optimizer.lr == 1e-4
    assert config.prm.optimizer.clip_grad == 10.0
    assert config.rollout.stop_token_ids == [1, 2]
    assert config.policy.dual_clip == 3.0
    assert config.advantage.whiten is False
    assert (config.run.name, config.run.seed) == ("a=b", 2)


def test_references_to_other_keys_are_resolved_after_overrides(tmp_path):
    path = write(tmp_path, "a.yaml", MINIMAL + "evaluation: {num_prompts: '${rollout.num_prompts}'}\n")
    assert prime(path, "rollout.num_prompts=6").evaluation.num_prompts == 6


def test_wrong_overrides_are_all_named(tmp_path):
    path = write(tmp_path, "a.yaml", MINIMAL)
    assert problems_of(path, "run.seed", "=3") == (
        "run.seed: not an override; write section.key=value",
        "=3: not an override; write section.key=value",
    )
    assert problems_of(path, "run.sed=1", "prm.beta=x") == (
        "run.sed: unknown key; did you mean 'seed'?",
        "prm.beta: expected a number, got 'x' (str)",
    )
    assert problems_of(path, "run.seed=[1")[0].startswith("override run.seed=[1: not a YAML mapping")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "expected a mapping of keys at the top, got a list"),
        ("12", "not a YAML mapping"),
        ("run: {name: [", "not a YAML mapping"),
        ("run: 1\nrun: 2\n", "found duplicate key run"),
        ("base: nowhere.yaml\n", "nowhere.yaml: no such file (named by `base:` in"),
        ("base: 5\n", "base: 5 in"),
        ("base: [other.yaml, 5]\n", "is no file; name one, or a list of them"),
        ("base: {other.yaml: 5}\n", "is no file; name one, or a list of them"),
        ("run: {name: '${nowhere.at.all}', num_steps: 1}\n", "nowhere"),
        ("run: {name: '???', num_steps: 1}\n", "run.name: "),
    ],
)
def test_unreadable_files(tmp_path, text, expected):
    (problem,) = problems_of(write(tmp_path, "bad.yaml", text))
    assert expected in problem


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {name: Größe, num_steps: 1}\n".encode("latin-1"))
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: cannot be read (") and problem.endswith("it must be text in UTF-8")


def test_missing_file_and_empty_file(tmp_path):
    assert "no such file" in problems_of(tmp_path / "none.yaml")[0]
    keys = [problem.split(":")[0] for problem in problems_of(write(tmp_path, "empty.yaml", ""))]
    assert keys == ["run", "model", "data", "rollout"]


def test_saved_config_is_complete_and_loads_back_equal(tmp_path):
    config = prime(write(tmp_path, "a.yaml", MINIMAL), "policy.optimizer.lr=3e-7", "prm.path='1e-6'")
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert to_dict(config)["policy"]["optimizer"]["lr"] == 3e-7
    assert "adam_eps" in (tmp_path / "resolved.yaml").read_text()


@settings(deadline=None, max_examples=30)
@given(
    name=st.one_of(
        st.sampled_from(
            ["${a.b}", "null", "1e-6", "true", "a: b", "#x", " pad ", "'", "\\", "a\nb", "02", "-", "\\${x}"]
        ),
        st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"])),
    ),
    lr=st.floats(min_value=0, exclude_min=True, max_value=1e6),
)
def test_any_text_and_number_survives_saving(tmp_path_factory, name, lr):
    folder = tmp_path_factory.mktemp("round")
    config = prime(write(folder, "a.yaml", MINIMAL))
    config.run.name = name
    config.policy.optimizer.lr = lr
    save_config(config, folder / "b.yaml")
    assert load_config(folder / "b.yaml") == config
