"""Reward: centred in the group, in one unit for all, and never better for a bad format."""

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


def earned(*costs: float, **weights: float) -> list[float]:
    """Traffic terms of strict answers that cost so much."""
    rewards = group_rewards(
        [outcome(cost) for cost in costs], ["strict"] * len(costs), RewardWeights(**weights)
    )
    assert [r.cost_veh_s for r in rewards] == list(costs)
    return [r.traffic for r in rewards]


def test_traffic_term_is_centred_and_in_units_of_the_scale():
    assert earned(80.0, 120.0, scale_veh_s=10.0) == [2.0, -2.0]


def test_a_small_difference_stays_small():
    assert earned(100.0, 101.0, scale_veh_s=5.0) == [0.1, -0.1]


def test_one_terrible_answer_leaves_the_difference_of_the_others_as_it_is():
    best, good = earned(0.0, 30.0)
    again, also, _ = earned(0.0, 30.0, 5000.0)
    assert again - also == pytest.approx(best - good)


def test_beyond_the_largest_regret_all_answers_earn_the_same():
    best, bad, worse = earned(10.0, 75.0, 900.0, scale_veh_s=30.0, max_regret_veh_s=60.0)
    assert bad == worse == pytest.approx(best - 2.0)


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
    regrets = [min(cost - min(costs), WEIGHTS.max_regret_veh_s) for cost in costs]
    for regret, total in zip(regrets, valid, strict=True):
        assert max(valid) - total == pytest.approx(regret / WEIGHTS.scale_veh_s, abs=1e-6)


def test_a_group_of_invalid_answers_earns_the_format_alone():
    rewards = group_rewards([None, None], ["invalid", "invalid"], WEIGHTS)
    assert [(r.traffic, r.format) for r in rewards] == [(0.0, -2.0)] * 2


# tanh of the cost, as it is or relative to max-pressure


@pytest.mark.parametrize(
    ("traffic", "expected"), [("tanh", (-1.0, -2.0)), ("tanh_relative", (0.5, -0.5))]
)
def test_a_cost_may_be_squashed(traffic, expected):
    weights = RewardWeights(traffic=traffic, scale_veh_s=100.0)
    rewards = group_rewards(
        [outcome(100.0), None, outcome(200.0)],
        ["strict", "invalid", "strict"],
        weights,
        reference=outcome(150.0),
    )
    better, invalid, worse = (reward.traffic for reward in rewards)
    assert (better, worse) == pytest.approx(tuple(map(math.tanh, expected)))
    assert invalid == worse


def test_relative_to_max_pressure_wants_its_outcome():
    with pytest.raises(ValueError, match="max-pressure, whose outcome is missing"):
        group_rewards([outcome(1.0)], ["strict"], RewardWeights(traffic="tanh_relative"))
