"""What the exit statuses of a rank, and of the launcher that waits for ranks, mean (docs/reference/faults.md)."""

INVALID_INPUT = 2
"""The configuration or its files; the same command fails again."""
PEER_LOST = 69
"""This rank lost another one and had to end; that one's status says why (EX_UNAVAILABLE of sysexits.h)."""
FAILED = 70
"""An error that nobody foresaw, with its traceback (EX_SOFTWARE)."""
INTERRUPTED = 75
"""A run that was asked to stop and has saved (EX_TEMPFAIL: try again)."""
STALLED = 76
"""A rank did not arrive where others waited for it (EX_PROTOCOL)."""

EXPLAINED = frozenset({INVALID_INPUT, PEER_LOST, FAILED, INTERRUPTED, STALLED})
"""A rank that ends so has said why."""
