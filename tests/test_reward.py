"""Reward: centred in the group, bounded below by a floor, and never better for a bad format."""

from __future__ import annotations

import math

import pytest
from decision_case import outcome
from hypothesis import given
from hypothesis import strategies as st

from envs.reward import RewardWeights, cost_veh_s, group_rewards

WEIGHTS = RewardWeights()


def test_cost_is_the_weighted_sum_of_the_terms():
    weights = RewardWeights(time_loss=1.0, junction_time_loss=0.5, halting=0.25)
    assert cost_veh_s(outcome(100.0, junction=40.0, halting=8.0), weights) == 122.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_cost_that_is_not_finite_is_an_error(broken):
    with pytest.raises(ValueError, match="cost of an outcome is"):
        cost_veh_s(outcome(broken), WEIGHTS)


def test_traffic_term_is_centred_and_divided_by_the_deviation():
    rewards = group_rewards([outcome(80.0), outcome(120.0)], ["strict", "strict"], WEIGHTS)
    assert [r.traffic for r in rewards] == [1.0, -1.0]
    assert [r.cost_veh_s for r in rewards] == [80.0, 120.0]


def test_the_floor_keeps_small_differences_small():
    rewards = group_rewards([outcome(100.0), outcome(101.0)], ["strict", "strict"], WEIGHTS)
    assert [r.total for r in rewards] == [0.1, -0.1]


def test_format_is_its_own_term():
    rewards = group_rewards(
        [outcome(100.0), outcome(100.0), None], ["strict", "partial", "invalid"], WEIGHTS
    )
    assert [r.format for r in rewards] == [0.0, -0.5, -2.0]
    assert [r.total for r in rewards] == [0.0, -0.5, -2.0]


@given(
    costs=st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
    num_invalid=st.integers(0, 4),
)
def test_an_invalid_answer_never_earns_more_than_a_valid_one(costs, num_invalid):
    outcomes = [*map(outcome, costs), *(None,) * num_invalid]
    formats = ["strict"] * len(costs) + ["invalid"] * num_invalid
    totals = [r.total for r in group_rewards(outcomes, formats, WEIGHTS)]
    valid, invalid = totals[: len(costs)], totals[len(costs) :]
    assert all(bad < min(valid) for bad in invalid)
    assert sorted(range(len(costs)), key=lambda i: costs[i]) == sorted(
        range(len(costs)), key=lambda i: (-valid[i], costs[i], i)
    )


def test_a_group_of_invalid_answers_earns_the_format_alone():
    rewards = group_rewards([None, None], ["invalid", "invalid"], WEIGHTS)
    assert [(r.traffic, r.format) for r in rewards] == [(0.0, -2.0)] * 2
