"""The command line as a user meets it: help, plans, errors without tracebacks, processes that end together."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_configs import make_start
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.assembly.verify_conversion import verify_bits, verify_logprobs
from megatron_prime.commands.demo import folder_suffix
from megatron_prime.commands.main import main
from megatron_prime.config.checks import check_config
from megatron_prime.config.loader import load_config
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.config.single_process import single_process
from megatron_prime.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "megatron_prime"]
COMMANDS = ("demo", "train", "sft", "check", "evaluate", "launch", "generate", "prepare", "verify", "convert", "replay")
SHAPES = {
    "arithmetic": "arithmetic",
    "arithmetic_sft": "arithmetic",
    "prime_qwen2.5_math_7b": "shapes/qwen2.5-math-7b",
    "prime_qwen2.5_32b": "shapes/qwen2.5-32b",
    "prime_qwen2.5_72b": "shapes/qwen2.5-72b",
    "prime_qwen2.5_math_7b_8xa100": "shapes/qwen2.5-math-7b",
    "prime_llama3.1_8b": "shapes/llama-3.1-8b",
    "prime_llama3.1_70b": "shapes/llama-3.1-70b",
    "prime_qwen3_8b": "shapes/qwen3-8b",
}


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Runs a command that must exit with 2; returns what it prints to stderr, which is no traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-prime {command}")


def test_help_names_every_command() -> None:
    result = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(f"\n    {command}" in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("recipe", SHAPES)
def test_every_recipe_has_a_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ROOT / "configs" / "models" / SHAPES[recipe]
    config = ROOT / "configs" / f"{recipe}.yaml"
    assert main(["check", str(config), f"model.path={shape}", "--shapes-only"]) == 0
    plan = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert str(shape) in plan["models"]
    if recipe == "prime_qwen2.5_72b":
        assert plan["layout"].strip() == "128 processes = 8 tensor x 4 pipeline x 4 data parallel"
        assert plan["rollouts"].strip() == "256 prompts x 4 = 1024 responses per step"


def test_a_plan_without_the_option_wants_weights_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ROOT / "configs" / "models" / SHAPES["prime_qwen2.5_72b"]
    lines = fails(
        capsys,
        "check",
        str(ROOT / "configs" / "prime_qwen2.5_72b.yaml"),
        f"model.path={shape}",
        "rollout.engine=transformers",
    )
    assert lines[0] == "ConfigError:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["data.train", "data.evaluation", "model.path"]
    assert lines[3].endswith("fetch the weights")


def test_shapes_only_still_checks_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "prime_qwen2.5_32b.yaml")
    shape = ROOT / "configs" / "models" / SHAPES["prime_qwen2.5_32b"]
    lines = fails(
        capsys, "check", config, f"model.path={shape}", "parallel.tensor_model_parallel_size=16", "--shapes-only"
    )
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["parallel.tensor_model_parallel_size"] * 2
    lines = fails(capsys, "check", config, f"model.path={tmp_path}", "filter.min_accuracy=0.9", "--shapes-only")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["filter.min_accuracy", "model.path"]


@pytest.mark.parametrize("command", ["train", "check", "evaluate"])
def test_all_problems_of_a_configuration_come_at_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "arithmetic.yaml")
    wrong = ("prm.betta=1", "rollout.num_prompts=many", "filter.enabled=1", "filter.min_accuracy=2")
    lines = fails(capsys, command, config, *wrong)
    assert lines[0] == "ConfigError:"
    assert "  prm.betta: unknown key; did you mean 'beta'?" in lines
    assert "  filter.min_accuracy: 2 is out of range; must be in [0, 1]" in lines
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == sorted(key.split("=")[0] for key in wrong)
    lines = fails(capsys, command, config, "model.path=nowhere", "filter.min_accuracy=0.9", "run.name=..")
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"model.path", "filter.min_accuracy", "run.name"}


def test_a_configuration_of_the_other_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sft, prime = (str(ROOT / "configs" / name) for name in ("arithmetic_sft.yaml", "arithmetic.yaml"))
    for arguments in (["train", sft], ["sft", prime], ["evaluate", sft], ["serve", sft]):
        lines = fails(capsys, *arguments)
        assert len(lines) == 2 and lines[1].startswith("  kind: ")
    assert fails(capsys, "demo", "run.num_steps=1")[1].startswith("  demo: takes only run.seed=N")
    # Before its first half has trained.
    assert fails(capsys, "demo", "rollout.engin=vllm")[1].startswith("  rollout.engin: unknown key")
    assert fails(capsys, "demo", "rollout.num_responses=1")[1].startswith("  rollout.num_responses: ")
    assert "no such file" in fails(capsys, "check", "absent.yaml")[1]


def test_evaluating_a_configuration_takes_no_options_of_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "arithmetic.yaml")
    for option, value in (("--num-samples", "4"), ("--dtype", "bfloat16"), ("--seed", "2")):
        assert fails(capsys, "evaluate", config, option, value)[1].startswith(f"  {option}: goes with --benchmarks")
    assert "a model needs --benchmarks" in fails(capsys, "evaluate", str(ROOT / "configs"))[1]


def test_a_demo_with_settings_has_folders_of_its_own() -> None:
    assert folder_suffix([]) == ""
    assert folder_suffix(["run.seed=2"]) == "_seed-2"
    assert (
        folder_suffix(["rollout.vllm.servers=[http://a:1]", "rollout.engine=vllm"])
        == "_engine-vllm_vllm.servers-http-a-1-"
    )


def test_a_verifier_of_ones_own_is_looked_for_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_start("qwen2.5-0.5b", tmp_path / "start")
    config = str(ROOT / "configs" / "arithmetic.yaml")
    lines = fails(capsys, "check", config, f"model.path={tmp_path / 'start'}", "verifier.factory=absent:make")
    assert lines[1] == (
        "  verifier.factory: 'absent:make' cannot be imported: ModuleNotFoundError: No module named 'absent'"
        "; install it, or put its folder on PYTHONPATH"
    )


def test_wrong_rows_are_found_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "1+1=?", "response": "2"}\n{"prompt": \n')
    config = tmp_path / "my.yaml"
    config.write_text(
        "kind: sft\nrun: {name: my, num_steps: 1}\n"
        f"model: {{path: {ROOT / 'configs' / 'models' / 'arithmetic'}, init: random}}\n"
        f"data: {{kind: files, template: raw, train: [{data}], max_prompt_tokens: 8, max_response_tokens: 8}}\n"
        "sft: {batch_size: 1, optimizer: {lr: 1.0e-3}}\n"
    )
    lines = fails(capsys, "check", str(config))
    assert lines[0] == "DataError:" and lines[1].startswith(f"  {data}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["world_size=2", "pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"],
        ["world_size=4", "tensor_model_parallel_size=2", "sequence_parallel=true"],
    ],
)
@pytest.mark.parametrize("in_ranks", ["true", "false"])
def test_whatever_trains_can_be_evaluated_by_one_process(overrides: list[str], in_ranks: str) -> None:
    settings = ["rollout.engine=vllm", "rollout.vllm.tensor_parallel_size=2", f"rollout.vllm.in_ranks={in_ranks}"]
    config = load_config(ROOT / "configs" / "arithmetic.yaml", [*(f"parallel.{o}" for o in overrides), *settings])
    assert isinstance(config, PrimeConfig)
    config = single_process(config)
    assert config.parallel.world_size == 1 and config.rollout.vllm.tensor_parallel_size == 2
    assert check_config(config, None, check_files=False) == []


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "-0.1", "-0.1 is not 0 or more"),
        ("--temperature", "nan", "nan is not 0 or more"),
        ("--temperature", "hot", "'hot' is no number"),
        ("--max-tokens", "0", "0 is not 1 or more"),
        ("--num-responses", "0", "0 is not 1 or more"),
        ("--top-p", "0", "0 is not in (0, 1]"),
        ("--top-p", "1.5", "1.5 is not in (0, 1]"),
    ],
)
def test_sampling_options_have_ranges(option: str, value: str, expected: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "nowhere", "1 + 1?", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: {expected}" in capsys.readouterr().err


def test_questions_are_taken_literally(tmp_path: Path, capsys) -> None:
    start = tmp_path / "start"
    make_start("qwen2.5-0.5b", start)
    questions = [r"Simplify $\frac{1}{2} + \nu$, with \u0041 and \n.", "Größe von π²?\nEine Zeile mehr, 数学"]
    capsys.readouterr()
    assert main(["generate", str(start), *questions, "--raw", "--max-tokens", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=139,
        max_position_embeddings=64,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    target = folder.parent / "checkpoint"
    assert main(["convert", "to-megatron", str(folder), str(target)]) == 0
    return target


def test_the_tools_convert_and_verify_at_another_layout(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    def tool(name: str, *arguments: str) -> list[str]:
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    target, back = tmp_path / "target", tmp_path / "back"
    layout = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]
    lines = tool("convert_hf_to_megatron", str(folder), str(target), *layout, "--verify")
    assert lines[0] == "verified: 27 tensors are equal bit by bit" and lines[-1] == f"wrote {target}"
    gap = re.fullmatch(r"verified: log-probs of 69 tokens differ by at most (\S+) from transformers'", lines[1])
    assert gap and float(gap[1]) < 1e-4
    assert len(list(target.glob("*.distcp"))) == 4
    assert tool("convert_megatron_to_hf", str(target), str(back)) == [f"wrote {back}"]
    assert tool("convert_checkpoint", "to-hf", str(checkpoint), str(tmp_path / "one"))
    for found in (back, tmp_path / "one"):
        assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_verification_finds_one_changed_number(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6
    save_file(weights, changed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is not what"):
        verify_bits(changed, checkpoint, lambda done, total: None)
    told: list[tuple[int, int]] = []
    assert verify_bits(folder, checkpoint, lambda *seen: told.append(seen)).startswith("verified: 27 tensors")
    assert told[-1][0] == told[-1][1]
    weights["model.norm.weight"] *= 2
    save_file(weights, changed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a log-prob differs by .* from transformers'"):
        verify_logprobs(changed, checkpoint)


def test_a_dry_run_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ROOT / "configs" / "models" / "shapes" / "qwen2.5-72b"
    target = tmp_path / "target"
    layout = ["--tensor-model-parallel-size=8", "--pipeline-model-parallel-size=4"]
    assert main(["convert", "to-megatron", str(shape), str(target), *layout, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "GB in 32 files" in text and "__31_0.distcp" in text
    assert main(["convert", "to-hf", str(tmp_path), str(target), "--like", str(shape), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "963 tensors, 145.412 GB in 31 files" in text and "largest tensor  embedding" in text
    peak = re.search(r"peak memory +(\S+) GB", text)
    assert peak and float(peak[1]) < 8
    assert not target.exists()


def damaged(folder: Path, copy: Path, how: str) -> Path:
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file)
    return copy


@pytest.mark.parametrize(
    ("how", "expected"),
    [("truncated", "model.safetensors: damaged or truncated"), ("missing", "layers.1.mlp.up_proj.weight: missing")],
)
def test_a_damaged_folder_is_one_message(folder, tmp_path, capsys, how: str, expected: str) -> None:
    source = damaged(folder, tmp_path / "source", how)
    lines = fails(capsys, "convert", "to-megatron", str(source), str(tmp_path / "target"))
    assert lines[0] == "WeightsError:" and len(lines) == 2 and expected in lines[1]
    assert list(tmp_path.iterdir()) == [source]


def test_conversion_refuses_what_it_cannot_do(folder, checkpoint, tmp_path, capsys) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    for arguments in (["to-megatron", str(folder), str(target)], ["to-hf", str(checkpoint), str(target)]):
        lines = fails(capsys, "convert", *arguments)
        assert lines == ["CheckpointError:", f"  {target}: exists already; choose a new folder"]
    lines = fails(capsys, "convert", "to-hf", str(checkpoint), str(tmp_path / "new"), "--tensor-model-parallel-size=2")
    assert lines[0] == "ConfigError:" and "only for to-megatron" in lines[1]
    lines = fails(capsys, "convert", "to-hf", str(folder), str(tmp_path / "new"))
    assert lines == ["CheckpointError:", f"  {folder}: is no Megatron distributed checkpoint (no metadata.json)"]
    assert list(tmp_path.iterdir()) == [target] and [path.name for path in target.iterdir()] == ["mine"]


def test_what_is_no_failed_update_is_not_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = "those are runs/NAME/failures/step_*.pt"
    pickled = tmp_path / "trainer.pt"
    torch.save({"state": tmp_path}, pickled)
    for file in (pickled, ROOT / "configs" / "arithmetic.yaml", tmp_path):
        lines = fails(capsys, "replay", str(file))
        assert lines == ["DataError:", f"  {file}: is no failed update of a run, or damaged; {where}"]
    assert fails(capsys, "replay", str(tmp_path / "none.pt"))[1] == f"  {tmp_path / 'none.pt'}: no such file; {where}"


def test_an_error_on_every_rank_is_printed_once(tmp_path: Path) -> None:
    saved = tmp_path / "run" / "checkpoints" / "step_00000001"
    saved.mkdir(parents=True)
    command = [*COMMAND, "sft", str(ROOT / "configs" / "arithmetic_sft.yaml"), "parallel.world_size=2"]
    result = subprocess.run(
        [*command, f"run.directory={tmp_path}", "run.name=run"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines.count("CheckpointError:") == 1 and sum("manifest.json is missing" in line for line in lines) == 1
