"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_prime.watch.interrupt import stop_requests


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_an_answer_and_not_an_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
    assert signal.getsignal(number) == before


def test_only_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as should_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_launcher_in_a_thread_needs_no_signals() -> None:
    statuses: list[bool] = []

    def ask() -> None:
        with stop_requests() as should_stop:
            statuses.append(should_stop())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert statuses == [False]
