"""Signals: what may be shown and chosen, by hand on strings and as SUMO itself records it.

The property runs real simulations under random legal actions; SUMO writes down every second what
it shows (its `SaveTLSStates` event), so nothing of ours stands between the claim and the record.
"""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import replace
from functools import cache
from itertools import combinations, groupby, pairwise
from pathlib import Path

import pytest
import sumolib
from decision_case import JUNCTION, lane, observation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.scenario import load_scenario
from envs.signals import (
    clearance_state,
    conflicting_greens,
    green_states,
    legal_phases,
    transition_state,
)
from envs.types import Action, Scenario, SignalTiming
from envs.world import World

TIMING = SignalTiming()
STATES = st.text("GgyrsoO", min_size=1, max_size=12)


# Strings


def test_green_states_are_the_distinct_states_without_yellow():
    program = ["GGrr", "yyrr", "rrrr", "rrGg", "rrGy", "rrry", "GGrr", "rrur"]
    assert green_states(program) == ("GGrr", "rrGg")


def test_links_green_in_both_phases_stay_green_with_the_weaker_priority():
    assert transition_state("GGgGr", "GgGrG") == "Gggyr"


def test_clearance_leaves_only_common_greens():
    assert clearance_state("GGgGr", "GgGrG") == "Gggrr"


def test_right_on_red_goes_dark_while_it_changes():
    assert transition_state("sGr", "sry") == "syr"
    assert transition_state("sGr", "GrG") == "ryr"


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.text("Ggr", min_size=n, max_size=n)] * 2))
)
def test_a_transition_opens_nothing_that_one_of_its_phases_does_not(pair):
    now, following = pair
    for state in (transition_state(now, following), clearance_state(now, following)):
        for link, light in enumerate(state):
            assert light not in "Gg" or {now[link], following[link]} <= set("Gg")
            assert light != "G" or now[link] == following[link] == "G"


def test_conflicting_greens_are_foes_that_both_have_right_of_way():
    assert conflicting_greens("GGgr", [(0, 1), (0, 2), (1, 3)]) == ((0, 1),)


# What is legal


def test_before_min_green_only_the_running_phase_is_legal():
    seen = observation(lane(3), lane(3), lane(3), current=1, green_s=TIMING.min_green_s - 1)
    assert legal_phases(JUNCTION, seen, TIMING) == (1,)


def test_who_stands_within_the_junction_is_given_time_to_leave_it():
    seen = observation(lane(3), lane(3), current=1, green_s=10, inside=(2, 0, 0))
    assert legal_phases(JUNCTION, seen, TIMING) == (1,)
    assert legal_phases(JUNCTION, replace(seen, inside_veh=(0, 0, 0)), TIMING) == (0, 1, 2)


def test_who_stands_within_the_junction_does_not_hold_a_green_for_ever():
    seen = observation(
        lane(3), lane(3), current=1, green_s=TIMING.occupied_green_s, inside=(2, 0, 0)
    )
    assert legal_phases(JUNCTION, seen, TIMING) == (0, 1, 2)


def test_occupied_green_of_zero_turns_the_rule_off():
    seen = observation(lane(3), lane(3), current=1, green_s=10, inside=(2, 0, 0))
    assert legal_phases(JUNCTION, seen, replace(TIMING, occupied_green_s=0)) == (0, 1, 2)


def test_from_min_green_on_every_phase_is_legal():
    seen = observation(lane(3), lane(3), lane(3), current=1, green_s=TIMING.min_green_s)
    assert legal_phases(JUNCTION, seen, TIMING) == (0, 1, 2)


def test_after_max_green_the_running_phase_must_end():
    seen = observation(lane(3), lane(3), current=0, green_s=TIMING.max_green_s)
    assert legal_phases(JUNCTION, seen, TIMING) == (1, 2)


def test_nobody_else_waiting_lets_a_green_run_on():
    seen = observation(lane(3), current=0, green_s=10 * TIMING.max_green_s)
    alone = replace(JUNCTION, phases=JUNCTION.phases[:2])
    assert legal_phases(alone, seen, TIMING) == (0, 1)


def test_a_green_that_serves_nobody_ends_when_somebody_waits():
    seen = observation(lane(), lane(2, wait_s=10), current=0, served=0)
    assert legal_phases(JUNCTION, seen, TIMING) == (1, 2)


def test_lock_in_ends_when_another_lane_starves():
    # Lane 0 is headed by a vehicle that does not move under A; the east has waited too long.
    seen = observation(
        lane(5, wait_s=60), lane(1, wait_s=20), lane(3, wait_s=TIMING.starvation_s), served=0
    )
    assert legal_phases(JUNCTION, seen, TIMING) == (2,)


def test_the_longest_starving_lane_is_served_first():
    seen = observation(lane(), lane(2, wait_s=200), lane(1, wait_s=100), current=0, served=0)
    assert legal_phases(JUNCTION, seen, TIMING) == (1, 2)


def test_a_lane_that_only_the_running_green_serves_forces_nothing_upon_itself():
    seen = observation(lane(5, wait_s=300), lane(1, wait_s=30), current=0, served=0)
    others = replace(JUNCTION, phases=JUNCTION.phases[:2])
    assert legal_phases(others, seen, TIMING) == (1,)


def test_starvation_limit_of_zero_turns_the_rule_off():
    seen = observation(lane(5, wait_s=300), lane(1, wait_s=300), current=0, served=0)
    assert legal_phases(JUNCTION, seen, replace(TIMING, starvation_s=0)) == (0, 1, 2)


lane_states = st.builds(
    lane, st.integers(0, 9), st.tuples(*[st.integers(0, 3)] * 3), st.integers(0, 300)
)


@given(
    seen=st.builds(
        observation,
        lane_states,
        lane_states,
        lane_states,
        current=st.integers(0, 2),
        green_s=st.integers(0, 300),
        served=st.integers(0, 2),
        inside=st.tuples(*[st.integers(0, 2)] * 3),
    ),
    timing=st.builds(
        SignalTiming,
        occupied_green_s=st.sampled_from([0, 15]),
        max_green_s=st.integers(10, 200),
        starvation_s=st.sampled_from([0, 30, 90]),
    ),
)
def test_something_is_always_legal(seen, timing):
    legal = legal_phases(JUNCTION, seen, timing)
    assert legal
    assert set(legal) <= {0, 1, 2}
    assert list(legal) == sorted(set(legal))


# What SUMO shows


@cache
def foes(net_file: str) -> dict[str, frozenset[tuple[int, int]]]:
    """For every signal the pairs of its links that cross and never both have right of way.

    Pairs that a state of the net's own program gives `G` together are the map's own choice.
    """
    net = sumolib.net.readNet(net_file, withPrograms=True)
    links = defaultdict(set)
    for edge in net.getEdges():
        for connections in edge.getOutgoing().values():
            for c in connections:
                if c.getTLSID():
                    node = edge.getToNode()
                    place = (node.getID(), node.getLinkIndex(c))
                    links[c.getTLSID()].add((c.getTLLinkIndex(), *place))
    found = {}
    for tls in net.getTrafficLights():
        own = [
            phase.state for program in tls.getPrograms().values() for phase in program.getPhases()
        ]
        found[tls.getID()] = frozenset(
            (a, b)
            for (a, node, i), (b, other, j) in combinations(sorted(links[tls.getID()]), 2)
            if node == other
            and net.getNode(node).areFoes(i, j)
            and not any(state[a] == state[b] == "G" for state in own)
        )
    return found


def recorded(scenario: Scenario, tls_ids: list[str], folder: Path) -> tuple[Scenario, Path]:
    """The scenario with SUMO writing down every second what its signals show."""
    record, events = folder / "states.xml", folder / "record.add.xml"
    lines = [f"<timedEvent type='SaveTLSStates' source='{t}' dest='{record}'/>" for t in tls_ids]
    events.write_text(f"<additional>{''.join(lines)}</additional>")
    additional = (*scenario.additional_files, str(events))
    return replace(scenario, additional_files=additional), record


def shown_states(record: Path) -> dict[str, list[str]]:
    shown = defaultdict(list)
    for state in ET.parse(record).getroot().iter("tlsState"):
        shown[state.get("id", "")].append(state.get("state", ""))
    return shown


def walk(world: World, rng: random.Random, intervals: int) -> dict[str, list[int]]:
    """Random legal actions; the phase of every junction in every interval."""
    chosen = defaultdict(list)
    for _ in range(intervals):
        actions = {}
        for decision in world.decisions():
            assert decision.legal
            actions[decision.junction.tls_id] = Action(phase=rng.choice(decision.legal))
        world.step(actions)
        for tls_id, action in actions.items():
            chosen[tls_id].append(action.phase)
    return chosen


@pytest.fixture(scope="module")
def world():
    with World() as world:
        yield world


timings = st.builds(
    SignalTiming,
    yellow_s=st.integers(2, 4),
    all_red_s=st.integers(0, 2),
    min_green_s=st.integers(4, 25),
    occupied_green_s=st.sampled_from([0, 15, 30]),
    max_green_s=st.integers(30, 120),
    starvation_s=st.sampled_from([0, 40, 90]),
)


@pytest.mark.parametrize(
    "name",
    [
        "generated:1",
        "generated:2",
        "generated:5",
        "generated:6",
        "grid:2",
        "resco:cologne1",
        "resco:ingolstadt1",
    ],
)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(timing=timings, seed=st.integers(1, 10_000))
def test_no_signal_ever_shows_what_the_net_does_not_allow(world, tmp_path, name, timing, seed):
    scenario = replace(load_scenario(name), timing=timing)
    specs = {spec.tls_id: spec for spec in world.reset(scenario, seed)}
    scenario, record = recorded(scenario, list(specs), tmp_path)
    world.reset(scenario, seed)
    chosen = walk(world, random.Random(seed), intervals=40)
    world.trips()
    shown = shown_states(record)
    assert shown.keys() == specs.keys()
    for tls_id, states in shown.items():
        assert len(states) == 400
        phases = [phase.state for phase in specs[tls_id].phases]
        assert not [
            s for s in set(states) if conflicting_greens(s, foes(scenario.net_file)[tls_id])
        ]
        assert_yellow_between_green_and_red(states, timing.yellow_s)
        assert_greens_are_long_enough(states, phases, chosen[tls_id], timing)


def assert_yellow_between_green_and_red(states: list[str], yellow_s: int) -> None:
    for link in zip(*states, strict=True):
        runs = [(light, len(list(run))) for light, run in groupby(link)]
        for (light, _), (following, length) in pairwise(runs):
            if light in "Gg" and following not in "Gg":
                assert following == "y"
                assert length >= yellow_s
            assert light == "y" or following != "y" or light in "Gg"


def assert_greens_are_long_enough(
    states: list[str], phases: list[str], chosen: list[int], timing: SignalTiming
) -> None:
    """A chosen phase is shown, after the change, for at least `min_green_s` until the next."""
    interval_s, change_s = timing.decision_interval_s, timing.yellow_s + timing.all_red_s
    start_s, running = 0, 0
    for i, phase in enumerate([*chosen, -1]):
        if phase == running:
            continue
        now_s = i * interval_s
        assert set(states[start_s:now_s]) <= {phases[running]}
        if phase >= 0:
            assert now_s - start_s >= timing.min_green_s or i == 0
        start_s, running = now_s + change_s, phase
