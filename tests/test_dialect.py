"""Dialect: a decision has exactly one text, and an answer names one legal phase or none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from decision_case import JUNCTION, decision, lane, observation
from hypothesis import given
from hypothesis import strategies as st

from envs import dialect
from envs.dialect import messages, observation_text, round_s
from envs.scenario import RESCO_TIMINGS, load_scenario
from envs.types import SignalTiming
from envs.world import World

NAMES = [phase.name for phase in JUNCTION.phases]

legal_sets = st.sets(st.integers(0, 2), min_size=1).map(sorted)
lane_states = st.builds(
    lane,
    st.integers(0, 40),
    st.tuples(*[st.integers(0, 30)] * 3),
    st.integers(0, 4000),
    st.tuples(*[st.integers(0, 120)] * 2),
)
observations = st.builds(
    observation,
    lane_states,
    lane_states,
    lane_states,
    current=st.integers(0, 2),
    green_s=st.integers(0, 4000),
    free=st.tuples(*[st.floats(0, 1)] * 3),
    inside=st.tuples(*[st.integers(0, 120)] * 3),
    upstream=st.tuples(*[st.tuples(*[st.integers(0, 120)] * 2)] * 3),
)


def test_the_text_of_a_decision_is_exactly_this():
    seen = observation(
        lane(2, (1, 0, 3), 14, (3, 1)),
        lane(4, wait_s=98),
        current=2,
        green_s=17,
        free=(0.1, 1.0, 0.2),
        inside=(0, 2, 1),
        upstream=((3, 1), (0, 0), (0, 2)),
    )
    assert observation_text(decision(seen, legal=(0, 2))) == (
        "north through+right q2 n1 f3 w15 u3 v1: full q2 n1 m0 f3 w15 u3 v1 choose A\n"
        "north left q4 w105: inside i2 q4 n0 m0 f0 w105\n"
        "north right shared blocked q2 n1 f3 w15 u3 v1, north left yield blocked q4 w105, "
        "east through empty: "
        "green g15 t10 inside i1 q6 n1 m0 f3 w105 v2 choose C"
    )


@pytest.mark.parametrize(
    ("timing", "word"), [(SignalTiming(), "t10"), (RESCO_TIMINGS["arterial4x4"], "t5")]
)
def test_the_running_green_says_when_it_is_asked_about_again(timing, word):
    asked = replace(decision(observation(green_s=30)), timing=timing)
    assert f"green g30 {word} " in observation_text(asked)


@pytest.mark.parametrize(
    ("green_s", "wait_s", "current", "blocked"),
    [(10, 10, 1, True), (9, 40, 1, False), (40, 9, 1, False), (40, 40, 0, False)],
    ids=["stands in green", "green is young", "it moves", "it has red"],
)
def test_a_lane_whose_first_vehicle_stands_in_green_is_called_blocked(
    green_s, wait_s, current, blocked
):
    seen = observation(lane(), lane(4, wait_s=wait_s), current=current, green_s=green_s)
    line = observation_text(decision(seen)).splitlines()[1]
    assert ("blocked" in line.split()) is blocked


@given(seen=observations, legal=legal_sets)
def test_every_word_is_in_the_vocabulary(seen, legal):
    words = re.findall(r"[^\s,:]+", observation_text(decision(seen, legal)))
    other = {word for word in words if not word.isdigit() and word not in NAMES}
    assert other <= set(dialect.VOCABULARY)


@pytest.mark.parametrize("name", ["resco:ingolstadt7", "generated:6"])
def test_mapped_junctions_speak_the_vocabulary_too(name):
    with World() as world:
        world.reset(load_scenario(name), seed=1)
        text = "\n".join(observation_text(d) for d in world.decisions())
    words = {word for word in re.findall(r"[^\s,:]+", text) if not word.isdigit()}
    assert {w for w in words if not re.fullmatch("[A-Z]{1,2}", w)} <= set(dialect.VOCABULARY)


def test_instructions_come_first_when_asked_for():
    asked = decision(observation())
    assert [m["role"] for m in messages(asked)] == ["system", "user"]
    assert messages(asked, instructions=False) == [
        {"role": "user", "content": observation_text(asked)}
    ]


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_rounded_seconds_are_few_and_keep_their_order(a, b):
    assert round_s(a) in {*range(0, 60, 5), *range(60, 241, 15)}
    assert abs(round_s(a) - min(a, 240)) <= 7.5
    if a <= b:
        assert round_s(a) <= round_s(b)
