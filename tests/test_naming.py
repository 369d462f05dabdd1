"""Names of phases: a decision told in another order and under other names is the same decision."""

from __future__ import annotations

import random

import pytest
from decision_case import decision, lane, observation
from hypothesis import given
from hypothesis import strategies as st

from envs import dialect
from envs.answers import parse
from envs.controllers import max_pressure, max_wave
from envs.naming import NUM_DRAWN_NAMES, phase_name, renamed, retold


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "A"), (8, "J"), (24, "Z"), (25, "AA"), (26, "AB"), (49, "AZ"), (50, "BA")],
)
def test_names_count_like_the_columns_of_a_spreadsheet_without_the_word_i(index, name):
    assert phase_name(index) == name


def seen():
    return observation(
        lane(3, (1, 0, 0), 20), lane(1, wait_s=45), lane(2, (0, 2, 0)),
        current=2, green_s=10, free=(0.9, 0.1, 0.5), behind=(0, 3, 1), inside=(2, 0, 1),
        upstream=((4, 0), (0, 7), (0, 0)),
    )  # fmt: skip


ORDERS = st.permutations(range(3))
NAMES = st.permutations("KDBG").map(lambda names: names[:3])
TELLINGS = st.randoms(use_true_random=False)


def lines(told):
    return [line.split(" choose ")[0] for line in dialect.observation_text(told).splitlines()]


@given(ORDERS, NAMES)
def test_another_order_moves_the_lines_and_keeps_their_words(order, names):
    original, told = decision(seen(), (0, 2)), renamed(decision(seen(), (0, 2)), order, names)
    assert lines(told) == [lines(original)[old] for old in order]
    assert [phase.name for phase in told.junction.phases] == names


@given(ORDERS, NAMES)
def test_what_was_legal_stays_legal(order, names):
    told = renamed(decision(seen(), (0, 2)), order, names)
    assert {order[place] for place in told.legal} == {0, 2}
    assert told.legal == tuple(sorted(told.legal))


@given(TELLINGS)
def test_controllers_choose_the_same_green_under_any_name(rng):
    original, (told, _) = decision(seen()), retold(decision(seen()), rng)
    for controller in (max_pressure, max_wave):
        chosen = told.junction.phases[controller(told).phase]
        assert chosen.state == original.junction.phases[controller(original).phase].state


@given(TELLINGS)
def test_an_answer_means_the_line_that_ends_with_its_name(rng):
    told, order = retold(decision(seen(), (0, 2)), rng)
    for place, line in enumerate(dialect.observation_text(told).splitlines()):
        if order[place] in (0, 2):
            name = line.split(" choose ")[1]
            assert parse(told, f'{{"phase": "{name}"}}').action.phase == place


def test_every_drawn_name_comes_on_every_line():
    rng = random.Random(1)
    seen_on = [set(), set(), set()]
    for _ in range(300):
        told, _ = retold(decision(seen()), rng)
        for names, phase in zip(seen_on, told.junction.phases, strict=True):
            names.add(phase.name)
    assert seen_on == [{phase_name(i) for i in range(NUM_DRAWN_NAMES)}] * 3


def test_own_order_and_names_change_nothing():
    assert renamed(decision(seen()), (0, 1, 2), "ABC") == decision(seen())


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (0, 1, 3), (0, 1, 2, 3)])
def test_what_is_no_order_is_refused(order):
    with pytest.raises(ValueError, match="no order of 3 phases"):
        renamed(decision(seen()), order, "ABC")


@pytest.mark.parametrize("names", ["AB", "ABCD", "ABA"])
def test_names_that_do_not_tell_phases_apart_are_refused(names):
    with pytest.raises(ValueError, match="not 3 different names"):
        renamed(decision(seen()), (0, 1, 2), names)
