"""How many cores a process may use."""

from __future__ import annotations

import os

import pytest

from rl_ft.cores import usable_cores

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", ALL),
        ("50000 100000", 1),
        ("150000 100000", min(ALL, 2)),
        ("100000000 100000", ALL),
        ("no quota", ALL),
    ],
)
def test_a_container_s_share_counts_and_no_more_than_there_are(quota, cores, tmp_path):
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cores(tmp_path / "cpu.max") == cores


def test_without_control_groups_all_cores_count(tmp_path):
    assert usable_cores(tmp_path / "none") == ALL
