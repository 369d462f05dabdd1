from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_ft.advantage import group_advantages, is_zero_variance, with_surprise

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


def surprised(advantages, logps, canonical, valid=None, *, coef=0.1, group_size=2):
    """`with_surprise` of lists."""
    given = [torch.tensor(values) for values in (advantages, logps, canonical)]
    alive = torch.tensor(valid or [True] * len(advantages))
    return with_surprise(*given, alive, coef=coef, group_size=group_size).tolist()


def test_a_rare_answer_is_worth_more_by_how_much_rarer_it_is():
    likely, rare = surprised([0.0, 0.0], [math.log(0.8), math.log(0.2)], [True, True])
    assert rare == pytest.approx(0.1 * math.log(4) / 2)
    assert likely == pytest.approx(-rare)


def test_only_canonical_answers_are_paid_for_surprise():
    paid, unpaid = surprised([0.0, 0.0], [-2.0, -9.0], [True, False])
    assert paid == pytest.approx(0.1)
    assert unpaid == pytest.approx(-0.1)


def test_surprise_is_compared_within_a_group():
    assert surprised([0.5, 0.5, -1.0, 1.0], [-3.0, -3.0, -7.0, -7.0], [True] * 4) == [
        0.5,
        0.5,
        -1.0,
        1.0,
    ]


def test_a_failed_row_neither_gets_nor_gives_surprise():
    canonical, valid = [True] * 4, [True, True, True, False]
    advantages = surprised([0.0] * 4, [-1.0, -2.0, -3.0, -99.0], canonical, valid, group_size=4)
    assert advantages == pytest.approx([-0.1, 0.0, 0.1, 0.0])


def test_the_policy_of_maximum_entropy_is_where_surprise_and_reward_balance():
    rewards = torch.tensor([0.3, -0.1, -0.2])
    logps = torch.log_softmax(rewards / 0.1, 0).tolist()
    left = surprised(rewards.tolist(), logps, [True] * 3, group_size=3)
    assert left == pytest.approx([0.0] * 3, abs=1e-6)


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
