"""The table of metrics: every pattern is sound, and nothing falls through it or into two rows."""

from __future__ import annotations

import pytest

from megatron_prime.observe.metric_names import GROUPS, STAGES, metric_of
from megatron_prime.observe.metrics import LINE
from megatron_prime.observe.plots import PANELS, TRUST
from megatron_prime.verify.math.verifier import REWARDS

ROWS = [row for rows in GROUPS.values() for row in rows]


def test_names_belong_to_their_group_and_stand_once() -> None:
    assert [row.name.partition("/")[0] for row in ROWS] == [group for group, rows in GROUPS.items() for _ in rows]
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_cells_do_not_break_the_page() -> None:
    for row in ROWS:
        assert not any(sign in cell for cell in (row.unit, row.meaning, row.healthy, row.only) for sign in "|\n"), row


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("time/prm_update_seconds", "time/<stage>_seconds"),
        ("time/step_seconds", "time/step_seconds"),
        ("time/verdict_seconds/p50", "time/verdict_seconds/p50"),
        ("memory/rollout_gib", "memory/<stage>_gib"),
        ("memory/rollout_gpu_gib", "memory/<stage>_gpu_gib"),
        ("verdict/my_own_status", "verdict/<status>"),
        ("verdict/missing", "verdict/missing"),
    ],
)
def test_patterns_find_their_row(name: str, row: str) -> None:
    found = metric_of(name)
    assert found is not None and found.name == row


@pytest.mark.parametrize("name", ["time/lunch_seconds", "memory/gib", "prm/los", "prm/loss/x", "verdict/", "loss"])
def test_other_names_have_no_row(name: str) -> None:
    assert metric_of(name) is None


def test_what_console_and_plots_show_is_in_the_table() -> None:
    shown = {*LINE, *PANELS, *(line.key for line in TRUST)}
    assert {key for key in shown if metric_of(key) is None} == set()


def test_every_status_and_stage_is_matched_by_one_row() -> None:
    names = [*(f"verdict/{status}" for status in REWARDS), *(f"time/{stage}_seconds" for stage in STAGES)]
    assert all(sum(row.pattern.fullmatch(name) is not None for row in ROWS) == 1 for name in names)
