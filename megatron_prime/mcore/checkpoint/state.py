"""A trained model as chunks of stored tensors: weights, float32 masters and optimizer moments, whatever the layout.

Megatron says where each parameter of a rank lies in the whole model (``sharded_state_dict``). Everything an optimizer
keeps for a parameter lies in the same place of a tensor of its own, ``optimizer.state.exp_avg.<name>``. A distributed
optimizer owns a range of a parameter's flattened elements, which is one to three rectangles of it; so every rank writes
what it owns and reads what it needs, and nothing is gathered.

Call these functions inside `cpu.megatron_platform` (`load_weights` sees to it itself).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prime.checkpoint.torch_dist import COMMON_FILE, StoredChunk, one_line, read_chunks, read_description
from megatron_prime.errors import CheckpointError
from megatron_prime.mcore.cpu import on_megatron_platform

_STEP = "step"
_MASTER = "fp32_param"
_OPTIMIZER = "optimizer.state"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A block of rows of a parameter on this rank, and its place in the stored tensor."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    leading: int
    """Dimensions of the stored tensor before the parameter's own (the layer)."""
    tensor: Tensor
    start: int
    """Index of its first element in the flattened parameter."""
    may_grow: bool
    """Rows are padding beyond the vocabulary, and another layout has another number of them."""


def model_chunks(models: Sequence[Any]) -> list[StoredChunk]:
    """This rank's weights as views.

    Args:
        models: Megatron's model, or its parts on this rank where stages are interleaved.
    """
    return [
        StoredChunk(piece.key, piece.shape, piece.offsets, piece.tensor.view((1,) * piece.leading + piece.tensor.shape))
        for pieces in _pieces(models).values()
        for piece in pieces
    ]


def optimizer_chunks(models: Sequence[Any], optimizer: Any) -> list[StoredChunk]:
    """Returns this rank's optimizer states of the model's parameters, as views.

    Args:
        models: Megatron's model, or its parts on this rank where stages are interleaved.
        optimizer: Megatron's optimizer over them; states that do not exist yet are made (zeros).
    """
    pieces_of = _pieces(models)
    chunks: list[StoredChunk] = []
    for inner in _inner_optimizers(optimizer):
        _allocate(inner)
        for parameter, start, states in _states(inner):
            for name, values in states.items():
                for piece in pieces_of[id(parameter)]:
                    key = f"{_OPTIMIZER}.{name}.{piece.key}"
                    for offsets, part in _rectangles(piece, start, values):
                        chunks.append(StoredChunk(key, piece.shape, offsets, part))
    return chunks


def step_count(optimizer: Any) -> int | None:
    """Steps that the optimizer has made; None on a rank that owns no parameter."""
    for inner in _inner_optimizers(optimizer):
        _allocate(inner)
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                # torch's Adam counts steps per parameter, Transformer Engine's and apex's per group.
                return int(inner.optimizer.state[parameter].get(_STEP, group.get(_STEP, 0)))
    return None


@on_megatron_platform
def load_weights(models: Sequence[Any], folder: Path) -> None:
    """Reads a checkpoint's weights into a model of any layout.

    Args:
        models: Megatron's model, or its parts on this rank where stages are interleaved.
        folder: the checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    with torch.no_grad():
        _read(folder, model_chunks(models), _growing(models))


def load_training_state(models: Sequence[Any], optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Reads weights, optimizer and learning-rate schedule of a checkpoint of any layout.

    Args:
        models: Megatron's model, or its parts on this rank where stages are interleaved.
        optimizer: Megatron's optimizer over them.
        scheduler: of its learning rate.
        folder: the checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    try:
        common = torch.load(folder / COMMON_FILE, weights_only=True)
        num_steps, schedule = common["optimizer"]["step"], common["scheduler"]
    except Exception as error:  # torch unzips and unpickles: damage shows as anything
        raise CheckpointError(f"{folder}: damaged, or weights only: {COMMON_FILE}: {one_line(error)}") from error
    with torch.no_grad():
        _read(folder, model_chunks(models) + optimizer_chunks(models, optimizer), _growing(models))
    for inner in _inner_optimizers(optimizer):
        _set_step_count(inner, num_steps)
    scheduler.load_state_dict(schedule)


def _read(folder: Path, wanted: list[StoredChunk], growing: set[str]) -> None:
    metadata = read_description(folder)
    problems = []
    for key, chunks in itertools.groupby(wanted, key=lambda chunk: chunk.key):
        chunk = next(chunks)
        stored: Any = metadata.state_dict_metadata.get(key)
        if stored is None:
            problems.append(f"{folder}: {key}: missing")
        elif tuple(stored.size) != chunk.shape and not (key in growing and tuple(stored.size[1:]) == chunk.shape[1:]):
            problems.append(f"{folder}: of another model: {key} has shape {tuple(stored.size)}, not {chunk.shape}")
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    for chunk in wanted:
        if chunk.key in growing:
            chunk.tensor.zero_()
    read_chunks(folder, metadata, wanted)


def _growing(models: Sequence[Any]) -> set[str]:
    """Keys of tensors with rows of padding, which nothing depends on."""
    keys = {piece.key for pieces in _pieces(models).values() for piece in pieces if piece.may_grow}
    names = ("exp_avg", "exp_avg_sq", _MASTER)
    return keys | {f"{_OPTIMIZER}.{name}.{key}" for name in names for key in keys}


def _pieces(models: Sequence[Any]) -> Mapping[int, list[_Piece]]:
    """Maps each parameter of this rank, by id, to its places in stored tensors."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    pieces: dict[int, list[_Piece]] = defaultdict(list)
    for sharded in itertools.chain(*(model.sharded_state_dict().values() for model in models)):
        # Gate and up projection are one parameter and two places.
        parts: Any = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
        if not isinstance(parts[0], ShardedTensor):
            continue
        parameter = sharded.data
        for part in parts:
            tensor = part.data.detach()
            pieces[id(parameter)].append(
                _Piece(
                    part.key,
                    tuple(part.global_shape),
                    tuple(part.global_offset),
                    part.prepend_axis_num,
                    tensor,
                    tensor.storage_offset() - parameter.storage_offset(),
                    part.allow_shape_mismatch,
                )
            )
    return pieces


def _inner_optimizers(optimizer: Any) -> list[Any]:
    """Those that hold states; a rank without trainable parameters has none."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [inner for inner in chained if not getattr(inner, "is_stub_optimizer", False)]


def _states(inner: Any) -> Iterator[tuple[Tensor, int, Mapping[str, Tensor]]]:
    """(model parameter, first flattened element, flattened states from there on) for what this rank owns."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if isinstance(inner, DistributedOptimizer):
        for parameter, (group, order) in inner.model_param_group_index_map.items():
            owned = inner._get_model_param_range_map(parameter)["param"]
            yield parameter, owned.start, _named_states(inner, parameter, inner.param_groups[group]["params"][order])
        return
    groups = zip(getattr(inner, "float16_groups", []), getattr(inner, "fp32_from_float16_groups", []), strict=True)
    model_of = {id(main): model for models, mains in groups for model, main in zip(models, mains, strict=True)}
    for group in inner.param_groups:
        for main in group["params"]:
            parameter = model_of.get(id(main), main)
            yield parameter, 0, _named_states(inner, parameter, main)


def _named_states(inner: Any, parameter: Tensor, main: Tensor) -> dict[str, Tensor]:
    states = {name: value for name, value in inner.optimizer.state[main].items() if name != _STEP}
    if parameter.dtype != torch.float32:
        states[_MASTER] = main
    flat = {name: value.detach().view(-1) for name, value in states.items()}
    assert all(value.numel() == main.numel() for value in flat.values()), f"states that are no tensors: {sorted(flat)}"
    return flat


def _rectangles(piece: _Piece, start: int, values: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Cuts the overlap of a flattened range with a piece into rectangles: (offsets in the stored tensor, view).

    A distributed optimizer owns ranges of flattened elements, while the format stores rectangles.
    """
    numel = piece.tensor.numel()
    first, last = max(start, piece.start), min(start + values.numel(), piece.start + numel)
    width = math.prod(piece.tensor.shape[1:])
    while first < last:
        row, column = divmod(first - piece.start, width)
        # At most three rectangles: the rest of a row that has begun, all whole rows, the beginning of the last row.
        whole_rows = (last - first) // width if column == 0 else 0
        length = whole_rows * width or min(width - column, last - first)
        part = values[first - start : first - start + length]
        offsets = list(piece.offsets)
        offsets[piece.leading] += row
        if piece.tensor.dim() > 1:
            offsets[-1] += column
            part = part.view(max(whole_rows, 1), -1)
        yield tuple(offsets), part.view((1,) * piece.leading + part.shape)
        first += length


def _allocate(inner: Any) -> None:
    """Makes the states of an optimizer that has not stepped, as its first step would."""
    if inner.optimizer.state:
        return
    inner.init_state_fn(inner.optimizer, inner.config)
    _set_step_count(inner, 0)


def _set_step_count(inner: Any, num_steps: int) -> None:
    per_parameter = isinstance(inner.optimizer, torch.optim.Adam)
    for group in inner.optimizer.param_groups:
        if not per_parameter:
            group[_STEP] = num_steps
            continue
        for parameter in group["params"]:
            # The same device on which torch's own first step would create it.
            on_device = group["fused"] or group["capturable"]
            device = parameter.device if on_device else torch.device("cpu")
            inner.optimizer.state[parameter][_STEP] = torch.tensor(float(num_steps), device=device)
