"""How GPUs are shared among what works at the same time."""

from __future__ import annotations

import pytest

from rl_ft.cluster import gpu_share


@pytest.mark.parametrize(
    ("gpus", "num_holders", "share"),
    [
        (0.0, 1, 0.0),
        (0.0, 2, 0.0),
        (1.0, 1, 1.0),
        (1.0, 2, 0.5),
        (2.0, 2, 1.0),
        (2.0, 3, 0.5),
        (3.0, 4, 0.5),
        (8.0, 2, 1.0),
    ],
)
def test_each_has_a_whole_gpu_where_there_are_enough_else_an_equal_part(
    monkeypatch, gpus, num_holders, share
):
    resources = {"CPU": 4.0} | ({"GPU": gpus} if gpus else {})
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert gpu_share(num_holders) == share
