"""How GPUs are shared among what works at the same time."""

from __future__ import annotations

import pytest

from envs.errors import UserError
from rl_ft.cluster import gpu_share, require_whole_gpus


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


@pytest.mark.parametrize(("gpus", "is_enough"), [(0.0, False), (2.0, False), (3.0, True)])
def test_nccl_wants_a_whole_gpu_for_each(monkeypatch, gpus, is_enough):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus} if gpus else {})
    if is_enough:
        require_whole_gpus(3)
        return
    with pytest.raises(UserError, match="3 in all, but the cluster has fewer"):
        require_whole_gpus(3)
