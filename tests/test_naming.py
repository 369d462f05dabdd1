"""Names of phases: a decision told in another order is the same decision."""

from __future__ import annotations

import pytest
from decision_case import decision, lane, observation
from hypothesis import given
from hypothesis import strategies as st

from envs import dialect
from envs.controllers import max_pressure, max_wave
from envs.naming import phase_name, renamed


@pytest.mark.parametrize(
    ("index", "name"), [(0, "A"), (25, "Z"), (26, "AA"), (27, "AB"), (51, "AZ"), (52, "BA")]
)
def test_names_count_like_the_columns_of_a_spreadsheet(index, name):
    assert phase_name(index) == name


def seen():
    return observation(
        lane(3, (1, 0, 0), 20), lane(1, wait_s=45), lane(2, (0, 2, 0)),
        current=2, green_s=10, free=(0.9, 0.1, 0.5), behind=(0, 3, 1),
    )  # fmt: skip


ORDERS = st.permutations(range(3))


def lines(told):
    return [line.split(" choose ")[0] for line in dialect.observation_text(told).splitlines()]


@given(ORDERS)
def test_another_order_moves_the_lines_and_keeps_their_words(order):
    original, told = decision(seen(), (0, 2)), renamed(decision(seen(), (0, 2)), order)
    assert lines(told) == [lines(original)[old] for old in order]
    assert [phase.name for phase in told.junction.phases] == ["A", "B", "C"]


@given(ORDERS)
def test_what_was_legal_stays_legal(order):
    told = renamed(decision(seen(), (0, 2)), order)
    assert {order[place] for place in told.legal} == {0, 2}
    assert told.legal == tuple(sorted(told.legal))


@given(ORDERS)
def test_controllers_choose_the_same_green_under_any_name(order):
    original, told = decision(seen()), renamed(decision(seen()), order)
    for controller in (max_pressure, max_wave):
        chosen = told.junction.phases[controller(told).phase]
        assert chosen.state == original.junction.phases[controller(original).phase].state


def test_the_original_order_changes_nothing():
    assert renamed(decision(seen()), (0, 1, 2)) == decision(seen())


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3)])
def test_an_order_must_hold_every_phase_once(order):
    with pytest.raises(ValueError, match="no order of 3 phases"):
        renamed(decision(seen()), order)
