"""Advantages by which answers weigh what they weigh in the policy, and are drawn to a target."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_ft.target import Target

REWARDS = [0.0, -0.5, -2.0]
LOGITS = [1.0, -0.3, 0.4]


def advantages(
    rewards,
    logps,
    answers=None,
    canonical=None,
    valid=None,
    *,
    given=None,
    coef=0.3,
    group_size=None,
):
    """Of lists; `answers` are rows' token ids, by default all different, each given once."""
    num = len(rewards)
    rows = answers or range(num)
    return (
        Target(coef=coef, temperature=0.2)
        .advantages(
            torch.tensor(rewards, dtype=torch.float64),
            torch.tensor(logps, dtype=torch.float64),
            torch.tensor([[row, 7] for row in rows]),
            torch.tensor(given or [1] * num),
            torch.tensor(canonical or [True] * num),
            torch.tensor(valid or [True] * num),
            group_size=group_size or num,
        )
        .tolist()
    )


def objective(logits, coef):
    """E_p[reward] - coef * KL(target || p) over the answers, up to what does not depend on p."""
    logps = logits.log_softmax(0)
    rewards = torch.tensor(REWARDS, dtype=logits.dtype)
    target = (rewards / 0.2).softmax(0)
    return (logps.exp() * rewards).sum() + coef * (target * logps).sum()


@pytest.mark.parametrize("coef", [1e-9, 0.3, 2.0])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 0, 1, 0, 2]])
def test_the_gradient_is_that_of_the_objective_however_often_an_answer_is_there(rows, coef):
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)[rows]
    rewards = [REWARDS[row] for row in rows]
    earned = advantages(rewards, logps.tolist(), rows, coef=coef)
    weighted = torch.tensor(earned, dtype=torch.float64) * logps
    [ours] = torch.autograd.grad(weighted.mean(), logits)
    [exact] = torch.autograd.grad(objective(logits, coef), logits)
    assert ours.tolist() == pytest.approx(exact.tolist(), abs=1e-12)


def test_a_good_answer_that_the_policy_never_gives_is_lifted():
    unlikely, _ = advantages([0.0, -1.0], [-20.0, 0.0])
    assert unlikely == pytest.approx(2 * 0.3 / (1 + math.exp(-5)), rel=1e-6)


def test_a_bad_answer_that_the_policy_never_gives_is_left_alone():
    _, unlikely = advantages([0.0, -2.0], [0.0, -20.0])
    assert abs(unlikely) < 1e-4


def test_a_misspelling_is_never_a_target():
    right, misspelt = advantages([0.0, 0.0], [-1.0, -3.0], canonical=[True, False], given=[3, 1])
    assert right == pytest.approx(2 * 0.3 * 0.25)
    assert misspelt == pytest.approx(-right)


def test_a_misspelling_weighs_as_often_as_it_was_given_however_unlikely_each_is():
    """Of all misspellings a group holds what was drawn: to weigh them again would forgive them."""
    logps, given = [-0.1, -30.0, -9.0], [6, 2, 0]
    earned = advantages([0.0, -4.0, 0.0], logps, None, [True, False, True], given=given)
    assert earned[1] == pytest.approx(3 * 0.25 * (-4.0 + 1.0 - 0.3), rel=1e-6)


def test_a_group_of_misspellings_ascends_its_reward_alone():
    better, worse = advantages([0.0, -2.0], [-1.0, -2.0], canonical=[False, False], given=[1, 3])
    assert better == pytest.approx(2 * 0.25 * 1.5)
    assert worse == pytest.approx(-better)


def test_a_failed_row_neither_gets_nor_gives_anything():
    kept = advantages([0.0, -1.0], [-0.5, -1.0], group_size=2)
    valid = [True, True, False, False]
    with_failed = advantages(
        [0.0, -1.0, 0.0, 9.0], [-0.5, -1.0, 0.0, 0.0], [0, 1, 0, 3], None, valid
    )
    assert with_failed == pytest.approx([2 * kept[0], 2 * kept[1], 0.0, 0.0])


def test_a_group_in_which_all_failed_gets_nothing():
    assert advantages([0.0, 0.0], [-1.0, -2.0], valid=[False, False]) == [0.0, 0.0]


def test_groups_do_not_see_each_other():
    together = advantages([0.0, -1.0, -3.0, 0.0], [-0.5, -1.0, -0.1, -2.0], group_size=2)
    apart = advantages([0.0, -1.0], [-0.5, -1.0]) + advantages([-3.0, 0.0], [-0.1, -2.0])
    assert together == pytest.approx(apart)


ROWS = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 0)), min_size=1, max_size=8)


@given(ROWS, st.floats(-1e3, 1e3))
def test_advantages_sum_to_zero_and_do_not_see_what_all_rewards_share(rows, shift):
    rewards, logps = zip(*rows, strict=True)
    earned = advantages(rewards, logps)
    assert sum(earned) == pytest.approx(0, abs=1e-6)
    assert advantages([r + shift for r in rewards], logps) == pytest.approx(earned, abs=1e-6)
