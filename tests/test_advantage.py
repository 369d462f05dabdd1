from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_ft.advantage import group_advantages, is_zero_variance

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=16)


def test_advantages_are_centred():
    assert group_advantages((1.0, 3.0), (True, True)) == (-1.0, 1.0)


def test_a_small_difference_stays_small():
    assert group_advantages((1.0, 1.5, 1.25), (True,) * 3) == (-0.25, 0.25, 0.0)


def test_a_failed_completion_counts_for_nothing():
    assert group_advantages((-4.0, 4.0, 9.0), (True, True, False)) == (-4.0, 4.0, 0.0)


def test_rewards_that_differ_by_rounding_are_one_reward():
    assert group_advantages((0.1 + 0.2, 0.3, 0.3), (True,) * 3) == (0.0,) * 3


@pytest.mark.parametrize(
    ("rewards", "valid", "constant"),
    [
        ((1.0, 1.0), (True, True), True),
        ((1.0, 2.0), (True, True), False),
        ((1.0, 2.0), (True, False), True),
        ((1.0, 2.0), (False, False), True),
        ((0.0, 0.0), (True, True), True),
    ],
)
def test_zero_variance_looks_at_valid_completions_only(rewards, valid, constant):
    assert is_zero_variance(rewards, valid) is constant


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_even_where_masked(broken):
    with pytest.raises(ValueError, match="finite"):
        group_advantages((0.0, broken), (True, False))
    with pytest.raises(ValueError, match="finite"):
        is_zero_variance((broken, 0.0), (True, True))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 rewards but 1"):
        group_advantages((0.0, 1.0), (True,))


@given(REWARDS)
def test_advantages_sum_to_zero_and_keep_the_order(rewards):
    advantages = group_advantages(rewards, [True] * len(rewards))
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    pairs = [(r, a) for r, a in zip(rewards, advantages, strict=True)]
    assert [a for _, a in sorted(pairs)] == sorted(advantages)


@given(REWARDS, st.floats(-1e3, 1e3))
def test_advantages_do_not_see_what_all_rewards_share(rewards, shift):
    valid = [True] * len(rewards)
    before = group_advantages(rewards, valid)
    after = group_advantages([r + shift for r in rewards], valid)
    assert after == pytest.approx(before, abs=1e-5)
