"""What goes wrong with vLLM servers in refits: whose fault it was, and when a server is left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron_prime.rollout.vllm.wire.broadcast import ABORTED_PREFIX


class ServerFailures:
    """Failures of each server since it last took part in a refit.

    Args:
        max_restarts: a server has two chances, or one where this is 0; and how often an attempt may fail by no
            server's fault.
    """

    def __init__(self, max_restarts: int) -> None:
        self._num_chances = min(2, max_restarts + 1)
        self._max_unexplained = max_restarts
        self._of: dict[str, list[str]] = {}
        self._unexplained: list[str] = []

    def begin(self) -> None:
        """A new refit: everyone is asked again, but who took no part in the last one gets no second chance."""
        self._unexplained = []
        self._of = {url: reasons[1 - self._num_chances :] for url, reasons in self._of.items()}
        if self._num_chances == 1:
            self._of.clear()

    def add(self, failed: Mapping[str, str], *, reason: str) -> None:
        """An attempt that failed.

        Args:
            failed: the servers whose fault it was, and what was wrong with them.
            reason: what went wrong, where it was the fault of none.
        """
        for url, text in failed.items():
            self._of.setdefault(url, []).append(text)
        if not failed:
            self._unexplained.append(reason)

    def succeeded(self, urls: Collection[str]) -> None:
        """These servers took part."""
        for url in urls:
            self._of.pop(url, None)

    def excluded(self) -> set[str]:
        """Servers that have no chance left."""
        return {url for url, reasons in self._of.items() if len(reasons) >= self._num_chances}

    def last(self, url: str) -> str | None:
        """What was wrong with a server the last time; None: nothing."""
        return self._of[url][-1] if self._of.get(url) else None

    def give_up(self) -> str | None:
        """Why there should be no further attempt, if so."""
        return self._unexplained[-1] if len(self._unexplained) > self._max_unexplained else None


def servers_at_fault(failed: Mapping[str, str], culprit: str | None, first: Sequence[str]) -> dict[str, str]:
    """Of the servers that failed together those that failed by themselves.

    Args:
        failed: what each said.
        culprit: the server whose worker said that it was the one.
        first: servers that failed when nobody had given up yet.
    """
    if culprit is not None:
        return {culprit: failed.get(culprit, "a worker failed")}
    # The errors of those that only waited begin with the prefix.
    own = {url: text for url, text in failed.items() if ABORTED_PREFIX not in text}
    return own or {url: failed[url] for url in first[:1]}
