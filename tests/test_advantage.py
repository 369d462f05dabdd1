from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_ft.advantage import group_advantages, is_zero_variance, with_surprise

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=16)


def test_advantages_are_centred_and_divided_by_the_deviation():
    assert group_advantages((1.0, 3.0), (True, True), scale_floor=0.1) == (-1.0, 1.0)


def test_the_floor_keeps_small_differences_small():
    assert group_advantages((1.0, 3.0), (True, True), scale_floor=10.0) == (-0.1, 0.1)


def test_a_failed_completion_counts_for_nothing():
    with_failure = group_advantages((-4.0, 4.0, 9.0), (True, True, False), scale_floor=8.0)
    assert with_failure == (-0.5, 0.5, 0.0)


def test_a_group_without_variance_teaches_nothing():
    assert group_advantages((0.1 + 0.2, 0.3, 0.3), (True,) * 3, scale_floor=1e-30) == (0.0,) * 3


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
        group_advantages((0.0, broken), (True, False), scale_floor=1.0)
    with pytest.raises(ValueError, match="finite"):
        is_zero_variance((broken, 0.0), (True, True))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 rewards but 1"):
        group_advantages((0.0, 1.0), (True,), scale_floor=1.0)


def test_the_floor_must_be_positive():
    with pytest.raises(ValueError, match="scale_floor"):
        group_advantages((0.0, 1.0), (True, True), scale_floor=0.0)


def test_a_rare_action_is_worth_more_and_an_answer_without_one_is_not():
    worth = with_surprise((1.0, 1.0, 1.0, -2.0), (0, 0, 3, None), coef=0.1)
    half, quarter = 0.1 * math.log(2), 0.1 * math.log(4)
    assert worth == pytest.approx((1 + half, 1 + half, 1 + quarter, -2.0))


def test_a_group_that_agrees_is_not_surprised():
    assert with_surprise((0.5, 0.5), (1, 1), coef=1.0) == (0.5, 0.5)


def test_without_a_coefficient_rewards_are_what_they_were():
    assert with_surprise((1.0, -2.0), (0, 1), coef=0.0) == (1.0, -2.0)


@given(REWARDS, st.floats(0.01, 100))
def test_advantages_sum_to_zero_and_keep_the_order(rewards, floor):
    advantages = group_advantages(rewards, [True] * len(rewards), scale_floor=floor)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    pairs = [(r, a) for r, a in zip(rewards, advantages, strict=True)]
    assert [a for _, a in sorted(pairs)] == sorted(advantages)


@given(REWARDS, st.floats(-1e3, 1e3))
def test_advantages_do_not_see_what_all_rewards_share(rewards, shift):
    valid = [True] * len(rewards)
    before = group_advantages(rewards, valid, scale_floor=1.0)
    after = group_advantages([r + shift for r in rewards], valid, scale_floor=1.0)
    assert after == pytest.approx(before, abs=1e-5)
