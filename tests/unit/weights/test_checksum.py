import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prime.errors import WeightsError
from megatron_prime.weights.checksum import WeightChecksum


def digest(**tensors: torch.Tensor) -> str:
    result = WeightChecksum()
    for name, tensor in tensors.items():
        result.update(name, tensor)
    return result.hexdigest()


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(max_examples=30)
@given(
    size=st.integers(1, 200_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]),
    data=st.data(),
)
def test_every_single_bit_counts(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = (noise(size) * 9).to(dtype)
    before = digest(a=tensor)
    raw = tensor.view(torch.uint8)
    byte = data.draw(st.integers(0, raw.numel() - 1))
    raw[byte] = raw[byte] ^ (1 << data.draw(st.integers(0, 7)))
    assert digest(a=tensor) != before


@settings(max_examples=30)
@given(size=st.integers(2, 100_000), data=st.data())
def test_exchanged_values_count(size: int, data: st.DataObject) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    i = data.draw(st.integers(0, size - 1))
    j = data.draw(st.integers(0, size - 1).filter(lambda j: j != i))
    other = tensor.clone()
    other[i], other[j] = tensor[j], tensor[i]
    assert digest(a=other) != digest(a=tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structured_changes_count(dtype: torch.dtype) -> None:
    tensor = noise(64, 64, dtype=dtype)
    variants = [
        tensor,
        tensor.t(),
        tensor.flip(0),
        tensor.roll(1),
        -tensor,
        tensor * 2,
        tensor.view(32, 128),
        tensor.view(-1),
        tensor.to(torch.float64),
        torch.zeros_like(tensor),
        -torch.zeros_like(tensor),
        torch.zeros(0, 64),
        torch.zeros(64, 0),
    ]
    assert len({digest(a=variant) for variant in variants}) == len(variants)


def test_same_bytes_of_another_dtype_or_name_differ() -> None:
    tensor = noise(64, dtype=torch.bfloat16)
    assert len({digest(a=tensor), digest(b=tensor), digest(a=tensor.view(torch.float16)), digest()}) == 4
    assert digest(a=tensor, b=-tensor) != digest(a=-tensor, b=tensor)


def test_order_does_not_matter() -> None:
    tensors = {f"w{i}": noise(i + 1, 7) for i in range(10)}
    shuffled = list(tensors.items())
    random.Random(0).shuffle(shuffled)
    assert digest(**dict(shuffled)) == digest(**tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strides_offsets_and_gradients_do_not_matter(dtype: torch.dtype) -> None:
    tensor = noise(123, 457, dtype=dtype)
    expected = digest(a=tensor)
    assert digest(a=tensor.t().contiguous().t()) == expected
    assert digest(a=torch.nn.Parameter(tensor)) == expected
    padded = torch.zeros(tensor.numel() + 1, dtype=dtype)
    padded[1:] = tensor.view(-1)
    assert digest(a=padded[1:].view(123, 457)) == expected


def test_scalars_and_empty_tensors() -> None:
    assert digest(a=torch.tensor(1.0)) != digest(a=torch.tensor([1.0]))
    assert digest(a=torch.zeros(0)) != digest()


def test_a_name_may_appear_once() -> None:
    result = WeightChecksum()
    result.update("a", torch.zeros(1))
    with pytest.raises(WeightsError, match="a: appears twice"):
        result.update("a", torch.ones(1))
