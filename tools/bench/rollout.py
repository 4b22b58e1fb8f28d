"""Times the rollout engines beside transformers' own `generate`, in one run on one thread each.

`ours` is the embedded engine's sampling loop, `vllm` the engine process beside the trainer (where vLLM is installed).

Two workloads on the model size of the arithmetic demo, 4 answers to each of 64 prompts: answers that all have 30
tokens, and answers that end by themselves (32 tokens on average, 120 at the most). Only tokens up to and including
the end token count. Prints a table and writes build/bench/rollout.json.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.engine_setup import engine_setup
from common.measuring import bench_parser, machine, write_result
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from megatron_prime.batch import Prompt, SamplingParams
from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.embedded.kv_cache import ATTENTION_NAME
from megatron_prime.rollout.embedded.sampling import Request, sample
from megatron_prime.rollout.randomness import answer_key
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.folder_export import FolderExport
from megatron_prime.weights.hf_folder import HfFolder

CONFIG = Qwen2Config(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=32,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    pad_token_id=0,
)
NUM_PROMPTS, NUM_RESPONSES, END_TOKEN = 64, 4, 1
WORKLOADS = {"all 30 tokens": (30, False), "ending by themselves": (120, True)}
TINY_WORKLOADS = {"all 4 tokens": (4, False), "ending by themselves": (8, True)}


def make_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random weights behind our attention and behind transformers' own."""
    torch.manual_seed(0)
    ours, theirs = (
        AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation=name).eval()
        for name in (ATTENTION_NAME, "sdpa")
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def make_prompts() -> list[tuple[int, ...]]:
    """Prompts of 8 to 16 random tokens, each repeated for its answers."""
    lengths = torch.randint(8, 17, (NUM_PROMPTS,)).tolist()
    return [
        prompt
        for length in lengths
        for prompt in [tuple(torch.randint(2, CONFIG.vocab_size, (length,)).tolist())] * NUM_RESPONSES
    ]


def run_ours(model: PreTrainedModel, prompts: list[tuple[int, ...]], max_tokens: int, may_end: bool) -> int:
    """Samples once and returns the number of tokens."""
    samples = sample(
        model,
        [Request(prompt=prompt, key=answer_key(0, "bench", i)) for i, prompt in enumerate(prompts)],
        temperature=1.0,
        top_p=1.0,
        max_tokens=max_tokens,
        stop_token_ids=[END_TOKEN] if may_end else [],
        max_rows=len(prompts),
    )
    return sum(len(answer.token_ids) for answer in samples)


def run_transformers(model: PreTrainedModel, prompts: list[tuple[int, ...]], max_tokens: int, may_end: bool) -> int:
    """The same with left padding and `generate`, which also gives the scores that log-probs need."""
    width = max(map(len, prompts))
    output = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=END_TOKEN if may_end else None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[:, width:]
    logprobs = torch.stack(output.logits, dim=1).log_softmax(dim=-1).gather(2, tokens[:, :, None])
    assert logprobs.shape[:2] == tokens.shape
    ended_before = (tokens == END_TOKEN).cumsum(dim=1) - (tokens == END_TOKEN).long() > 0
    return int((~ended_before).sum()) if may_end else tokens.numel()


@contextmanager
def vllm_engine(model: PreTrainedModel) -> Iterator[VllmBeside]:
    """The same weights in an engine process."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        architecture = read_architecture(folder)
        section = VllmSection(kv_cache_gib=0.25, max_num_seqs=NUM_PROMPTS * NUM_RESPONSES)
        with closing(VllmBeside(engine_setup(Path(folder), section))) as engine:
            engine.load_weights(FolderExport(HfFolder(folder), architecture, torch.float32), version=0)
            yield engine


def run_vllm(engine: VllmBeside, prompts: list[tuple[int, ...]], max_tokens: int, may_end: bool) -> int:
    """The same through the engine's protocol, text and all."""
    asked = [
        Prompt(prompt_id=str(number), text="", token_ids=token_ids, ground_truth="", ability="math")
        for number, token_ids in enumerate(prompts[::NUM_RESPONSES])
    ]
    sampling = SamplingParams(
        num_responses=NUM_RESPONSES,
        temperature=1.0,
        top_p=1.0,
        max_response_tokens=max_tokens,
        seed=0,
        stop_token_ids=(END_TOKEN,) if may_end else (),
    )
    return sum(len(answer.token_ids) for row in engine.generate(asked, sampling) for answer in row)


def best_of(repeats: int, run: Callable[[], int]) -> tuple[float, int]:
    """Shortest time of a few runs, in seconds, and the tokens of that run."""
    timings = []
    for _ in range(repeats):
        start = time.perf_counter()
        num_tokens = run()
        timings.append((time.perf_counter() - start, num_tokens))
    return min(timings)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="the best of this many runs counts")
    options = parser.parse_args()
    workloads, repeats = (TINY_WORKLOADS, 1) if options.tiny else (WORKLOADS, options.repeats)
    torch.set_num_threads(1)
    ours, theirs = make_models()
    prompts = make_prompts()
    rows = []
    with ExitStack() as stack:
        variants: list[tuple[str, Callable[..., int], Any]] = [
            ("ours", run_ours, ours),
            ("transformers", run_transformers, theirs),
        ]
        if importlib.util.find_spec("vllm") is not None:
            variants.insert(1, ("vllm", run_vllm, stack.enter_context(vllm_engine(ours))))
        print(f"{'workload':22}{'variant':14}{'seconds':>9}{'tokens/s':>10}")
        for workload, (max_tokens, may_end) in workloads.items():
            for variant, run, model in variants:
                seconds, num_tokens = best_of(repeats, partial(run, model, prompts, max_tokens, may_end))
                rate = num_tokens / seconds
                rows.append({"workload": workload, "variant": variant, "seconds": seconds, "tokens_per_second": rate})
                print(f"{workload:22}{variant:14}{seconds:9.3f}{rate:10.0f}")
    write_result("rollout", machine("one thread"), rows, options)


if __name__ == "__main__":
    main()
