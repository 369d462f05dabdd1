"""Weights kept on the way: their mean, what a rewound run forgets, files whole or not at all."""

from __future__ import annotations

import pytest
import torch

from rl_ft.sections import GrpoConfig
from rl_ft.snapshots import Snapshots, is_averaged


@pytest.fixture
def kept(tmp_path) -> Snapshots:
    return Snapshots(tmp_path / "snapshots")


def weights(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensor = torch.full((2, 3), value, dtype=dtype)
    return {"model.embed_tokens.weight": tensor, "lm_head.weight": tensor}


def test_the_mean_is_over_all_versions(kept):
    for version, value in ((2, 1.0), (10, 4.0), (9, 7.0)):
        kept.add(version, weights(value))
    assert kept.versions() == [2, 9, 10]
    assert all(torch.equal(t, torch.full((2, 3), 4.0)) for t in kept.mean().values())
    assert kept.mean().keys() == weights(0.0).keys()


def test_the_mean_of_equal_weights_is_those_weights_to_the_last_bit(kept):
    torch.manual_seed(1)
    same = {"w": torch.randn(50, 50)}
    for version in range(7):
        kept.add(version, same)
    assert torch.equal(kept.mean()["w"], same["w"])


def test_a_version_that_is_made_anew_replaces_the_old_one(kept):
    kept.add(3, weights(1.0))
    kept.add(3, weights(5.0))
    assert kept.mean()["lm_head.weight"][0, 0] == 5.0


def test_rewinding_forgets_what_came_later(kept):
    for version in (1, 2, 3):
        kept.add(version, weights(float(version)))
    kept.rewind(1)
    assert kept.versions() == [1]


def test_the_mean_keeps_the_type(kept):
    for version, value in ((1, 1.0), (2, 2.0)):
        kept.add(version, weights(value, torch.bfloat16))
    mean = kept.mean()["lm_head.weight"]
    assert (mean.dtype, mean[0, 0].item()) == (torch.bfloat16, 1.5)


def test_half_written_files_are_no_versions(kept, tmp_path):
    kept.add(1, weights(1.0))
    (tmp_path / "snapshots" / ".2.partial").write_bytes(b"half")
    assert kept.versions() == [1]


def test_nothing_has_no_mean(kept):
    kept.add(1, weights(1.0))
    kept.clear()
    with pytest.raises(ValueError, match="no weights were kept"):
        kept.mean()


def test_the_versions_at_every_checkpoint_of_the_last_part_are_averaged():
    grpo = GrpoConfig(max_steps=45, save_steps=10, average_from=0.4)
    assert [v for v in range(46) if is_averaged(v, grpo)] == [20, 30, 40]
