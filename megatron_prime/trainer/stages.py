"""Time and memory of the stages of a step, and the phase that a run is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_prime import collectives
from megatron_prime.interfaces import Resident
from megatron_prime.trainer.memory import PeakMemory


class Stages:
    """Times named stages, records their peak memory, and reports which one is running.

    Args:
        announce: called with a stage's name when it starts.
        enter: called with the phase and the step whenever a stage starts or ends.
    """

    def __init__(
        self, announce: Callable[[str], None], enter: Callable[[str, int], None] = lambda phase, step: None
    ) -> None:
        self.step = 0
        """The running step; 0 before the first."""
        self._announce = announce
        self._enter_phase = enter
        self._phase = "step"
        self._memory = PeakMemory()
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._step_start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str, *roles: Resident, training: bool = False) -> Iterator[None]:
        """Times a ``with`` block; one name's blocks add up.

        Args:
            name: of the stage.
            roles: models that are awake in the block, and sleep afterwards.
            training: the models need their gradients and optimizer states too.
        """
        outer = self._phase
        self._announce(name)
        self._enter(name)
        start = time.perf_counter()
        self._memory.reset()
        try:
            for role in roles:
                role.wake(training=training)
            yield
            for role in roles:
                role.sleep()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            for key, peak in self._memory.gib(name).items():
                self._peaks[key] = max(peak, self._peaks.get(key, 0.0))
            self._enter(outer)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._enter_phase(phase, self.step)

    def drain(self) -> dict[str, float]:
        """Returns times and peak memory since the last call, and starts anew; collective.

        Returns:
            ``time/<stage>_seconds`` of this rank and all time as ``time/step_seconds``; ``memory/<stage>_gib``, and
            ``memory/<stage>_gpu_gib`` with CUDA: the peak of the rank that used most.
        """
        seconds, self._seconds = self._seconds, {}
        peaks, self._peaks = self._peaks, {}
        start, self._step_start = self._step_start, time.perf_counter()
        metrics = {f"time/{name}_seconds": value for name, value in seconds.items()}
        for other in collectives.all_gather(peaks):
            for key, peak in other.items():
                metrics[key] = max(peak, metrics.get(key, 0.0))
        return metrics | {"time/step_seconds": self._step_start - start}
