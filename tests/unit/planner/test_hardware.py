"""Profiles of machines."""

from __future__ import annotations

from megatron_prime.planner.hardware import GIB, PROFILES


def test_profiles_name_their_source() -> None:
    for name, profile in PROFILES.items():
        assert profile.name == name and profile.source
        assert 0 < profile.reserved_gib < profile.memory_gib
        assert profile.memory_gib * GIB > 0
