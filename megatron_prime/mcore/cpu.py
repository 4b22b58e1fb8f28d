"""Lets Megatron-Core run without CUDA, by patches that are active only while Megatron runs.

Megatron asks `torch.cuda` for the device, streams, events and random state, writes ``device="cuda"``
and compares ``param.type()`` with ``"torch.cuda.FloatTensor"``. `megatron_platform` answers these for
the CPU inside a ``with`` block and puts torch back afterwards: transformers and vLLM in the same
process see the real torch. With CUDA it does nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

Params = ParamSpec("Params")
Result = TypeVar("Result")

_CPU = torch.device("cpu")
_depth = 0


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects ``device="cuda"`` and reports CPU tensors under the type names that Megatron checks."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


class _Stream:
    """A stream of a device that has no streams."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _itself(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _patches() -> list[tuple[Any, str, Any]]:
    cuda = torch.cuda

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    exchange = torch.distributed.all_to_all_single

    def all_to_all_single(*args: Any, **kwargs: Any) -> Any:
        # Megatron converts split sizes from tensors to lists only if they are on a GPU.
        return exchange(*args, **{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})

    def not_compiled(function: Any = None, **kwargs: Any) -> Any:
        return function if function is not None else lambda f: f

    return [
        # Megatron compiles small functions at import; on a CPU that costs minutes and gains nothing.
        (torch, "compile", not_compiled),
        (torch.distributed, "all_to_all_single", all_to_all_single),
        (cuda, "current_device", lambda: _CPU),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Event),
        (cuda, "current_stream", _Stream),
        (cuda, "default_stream", _Stream),
        (cuda, "stream", lambda stream: contextlib.nullcontext()),
        (cuda, "synchronize", _nothing),
        (cuda, "empty_cache", _nothing),
        (cuda, "set_device", _nothing),
        (cuda, "memory_allocated", _zero),
        (cuda, "max_memory_allocated", _zero),
        (cuda, "default_generators", ()),
        (cuda, "get_rng_state", get_rng_state),
        (cuda, "set_rng_state", set_rng_state),
        (cuda.random, "get_rng_state", get_rng_state),
        (cuda.random, "set_rng_state", set_rng_state),
        (cuda, "manual_seed", torch.manual_seed),
        (cuda.nvtx, "range_push", _nothing),
        (cuda.nvtx, "range_pop", _nothing),
        (torch.Tensor, "cuda", _itself),
        (torch.nn.Module, "cuda", _itself),
    ]


@contextlib.contextmanager
def megatron_platform() -> Iterator[None]:
    """Runs Megatron code on whatever this machine has; re-entrant."""
    global _depth
    if torch.cuda.is_available() or _depth > 0:
        yield
        return
    # Megatron imports torch._dynamo, which builds tables of torch's functions and refuses duplicates: import it before
    # several of them are replaced by the same stand-in.
    importlib.import_module("torch._dynamo")
    with contextlib.ExitStack() as stack:
        for owner, name, value in _patches():
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_CudaMeansCpu())
        stack.enter_context(warnings.catch_warnings())
        # Megatron warns about every optional CUDA package that a CPU run cannot have.
        warnings.simplefilter("ignore")
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def on_megatron_platform(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorator: the whole function runs inside `megatron_platform`."""

    @wraps(function)
    def wrapped(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with megatron_platform():
            return function(*args, **kwargs)

    return wrapped
