"""What is read out of the fields: ranges in words, and what a resumed run may change."""

from typing import Annotated

import pytest
from pydantic import Field

from megatron_prime.config.keys import changeable_keys, kinds, range_of, sections
from megatron_prime.config.schema import ArithmeticData, FileData, PrimeConfig, SftConfig
from megatron_prime.config.section import MAY_CHANGE, Count, Fraction, FractionAboveZero, FractionBelowOne, Positive


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (Count, ">= 1"),
        (Positive | None, "> 0"),
        (Annotated[Fraction, MAY_CHANGE], "in [0, 1]"),
        (FractionBelowOne, "in [0, 1)"),
        (Annotated[FractionAboveZero | None, MAY_CHANGE], "in (0, 1]"),
        (list[Annotated[int, Field(ge=0, lt=2**32)]], "in [0, 4294967296)"),
        (str, ""),
        (bool, ""),
    ],
)
def test_range_in_words(hint, expected):
    assert range_of(hint) == expected


def test_kind_chooses_between_sections():
    hint = Annotated[ArithmeticData | FileData, Field(discriminator="kind")]
    assert kinds(hint) == {"arithmetic": ArithmeticData, "files": FileData}
    assert sections(Count | None) == ()


def test_a_resumed_run_may_change_what_is_marked_and_all_of_a_marked_section():
    keys = set(changeable_keys(PrimeConfig))
    assert {"run.num_steps", "parallel.world_size", "verifier.code.memory_gib", "policy.optimizer.on_nonfinite"} <= keys
    assert {"rollout.vllm.servers", "micro_batch.packed", "evaluation.every_steps"} <= keys
    assert not {"run.seed", "run.name", "policy.optimizer.lr", "rollout.vllm.max_model_len", "head.gemm"} & keys
    assert not any(key.startswith(("data.", "prm.beta", "advantage.", "filter.", "policy.clip")) for key in keys)
    assert "sft.optimizer.max_skipped_steps" in set(changeable_keys(SftConfig))
