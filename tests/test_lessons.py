"""Lessons: a state told in other words, with what its teacher would answer."""

from __future__ import annotations

import json
import math
import random
import re

import pytest

from rl_ft.lessons import draw_cheap, lessons

NUM = 4


def text_of(row):
    return row["messages"][0]["content"]


def answer_of(row):
    return row["messages"][-1]["content"]


@pytest.fixture(scope="module")
def told(states, data_config):
    return [lessons(state, "max_pressure", data_config, num=NUM) for state in states]


def test_the_tellings_of_a_state_differ_in_order_and_names_only(told):
    for tellings in told:
        assert len(tellings) == NUM
        [_] = {row["id"] for row in tellings}
        first, *others = [
            {
                line: row["cost_veh_s"].get(json.dumps({"phase": name})) if name else None
                for line, _, name in (
                    text.partition(" choose ") for text in text_of(row).splitlines()
                )
            }
            for row in tellings
        ]
        assert all(other == first for other in others)


def test_some_state_is_told_in_another_order(told):
    assert any(len({text_of(row) for row in tellings}) > 1 for tellings in told)


def test_legal_answers_are_those_that_the_prompt_offers(told):
    for row in (row for tellings in told for row in tellings):
        names = re.findall(r"choose ([A-Z]+)$", text_of(row), re.MULTILINE)
        assert row["legal_answers"] == [json.dumps({"phase": name}) for name in names]
        assert list(row["cost_veh_s"]) == row["legal_answers"]


@pytest.mark.parametrize("teacher", ["max_pressure", "lookahead"])
def test_a_teacher_answers_legally_and_by_its_rule(states, data_config, teacher):
    for state in states:
        rows = lessons(state, teacher, data_config, num=NUM, soften=False)
        assert all(answer_of(row) in row["legal_answers"] for row in rows)
        # Under whatever name: always the same phase, so the same cost.
        [cost] = {row["cost_veh_s"][answer_of(row)] for row in rows}
        assert teacher != "lookahead" or cost == min(rows[0]["cost_veh_s"].values())


def test_beside_the_questions_of_a_given_model_stand_the_answers_of_max_pressure(
    states, data_config
):
    given, taught = (
        [answer_of(row) for row in lessons(states[0], teacher, data_config, num=NUM)]
        for teacher in ("given", "max_pressure")
    )
    assert given == taught


def test_a_state_is_told_alike_to_every_teacher(states, data_config):
    one, other = (
        lessons(states[0], teacher, data_config, num=NUM)
        for teacher in ("max_pressure", "lookahead")
    )
    assert [text_of(row) for row in one] == [text_of(row) for row in other]


def drawn(costs, temperature_veh_s, times=400):
    rng = random.Random(1)
    return [draw_cheap(costs, temperature_veh_s, rng) for _ in range(times)]


def test_lookahead_insists_where_the_choice_matters():
    assert set(drawn({0: 900.0, 1: 100.0}, 10.0)) == {1}


def test_lookahead_leaves_open_what_costs_the_same():
    assert 150 < drawn({0: 100.0, 1: 100.0}, 10.0).count(0) < 250


def test_lookahead_is_followed_as_the_temperature_says():
    answers = drawn({0: 110.0, 1: 100.0}, 10.0)
    assert answers.count(0) / len(answers) == pytest.approx(1 / (1 + math.e), abs=0.06)
