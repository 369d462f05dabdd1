"""Controllers: each choice reckoned by hand, and delays near those that are known."""

from __future__ import annotations

import pytest
from decision_case import decision, lane, observation

from envs.controllers import max_pressure, max_wave, max_wave_extended, random_phase
from envs.errors import UserError
from envs.scenario import load_scenario
from envs.types import Action
from envs.world import World


@pytest.fixture(scope="module")
def world():
    with World() as world:
        yield world


def test_max_pressure_subtracts_the_queue_behind_the_junction():
    # Queues A 3, B 4, C 3 + 4 + 1 = 8; behind the junction 0, 0 and 5.
    seen = observation(lane(3), lane(4), lane(1), behind=(0, 0, 5))
    assert max_pressure(decision(seen)).phase == 1


def test_max_pressure_sees_no_moving_vehicle():
    assert max_pressure(decision(observation(lane(1), lane(0, (9, 9, 9))), (0, 1))).phase == 0


def test_max_wave_counts_queued_and_approaching_vehicles():
    seen = observation(lane(3), lane(0, (2, 1, 1)), behind=(0, 9, 9))
    assert max_wave(decision(seen, (0, 1))).phase == 1


@pytest.mark.parametrize(
    ("queue", "near", "green_s", "phase"),
    [(4, 0, 14, 0), (1, 3, 14, 0), (1, 2, 14, 1), (4, 0, 15, 1)],
    ids=["it queues", "it comes near", "too few", "for long enough"],
)
def test_extended_max_wave_keeps_a_green_that_has_vehicles_to_serve(queue, near, green_s, phase):
    seen = observation(lane(queue, (near, 0, 0)), lane(9), green_s=green_s)
    assert max_wave(decision(seen, (0, 1))).phase == 1
    assert max_wave_extended(decision(seen, (0, 1))).phase == phase


def test_only_legal_phases_are_chosen():
    seen = observation(lane(9), lane(9), lane(9))
    for controller in (max_pressure, max_wave, max_wave_extended, random_phase):
        assert controller(decision(seen, (1,))).phase == 1


@pytest.mark.parametrize("current", [0, 1, 2])
def test_a_tie_keeps_the_running_phase(current):
    assert max_pressure(decision(observation(current=current))).phase == current
    assert max_wave(decision(observation(current=current))).phase == current


def test_a_tie_without_the_running_phase_takes_the_first():
    assert max_pressure(decision(observation(current=0), (1, 2))).phase == 1


def test_random_repeats_by_seed_and_reaches_every_phase():
    chosen = [random_phase(decision(observation(), seed=seed)).phase for seed in range(40)]
    again = [random_phase(decision(observation(), seed=seed)).phase for seed in range(40)]
    assert chosen == again
    assert set(chosen) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "controller", "low_s", "high_s"),
    [
        ("resco:cologne1", "fixed", 42.9 * 0.9, 42.9 * 1.1),
        ("resco:cologne1", "max_pressure", 20.0, 30.0),
        ("resco:cologne1", "max_wave", 15.0, 24.0),
        ("resco:ingolstadt1", "fixed", 29.7 * 0.9, 29.7 * 1.1),
        ("resco:ingolstadt1", "max_pressure", 11.0, 17.5),
        ("resco:ingolstadt1", "max_wave", 11.0, 18.5),
    ],
)
def test_delay_on_mapped_junctions_is_near_the_known_one(world, name, controller, low_s, high_s):
    scenario = load_scenario(name)
    world.reset(scenario, seed=1, program=controller if controller == "fixed" else None)
    world.drive(controller, scenario.end_s)
    trips = world.trips()
    assert low_s < trips.delay_s < high_s
    assert not trips.gridlock


def test_actuated_signals_delay_less_than_the_fixed_plan(world):
    delays = {}
    scenario = load_scenario("resco:ingolstadt1")
    for program in ("fixed", "actuated"):
        world.reset(scenario, seed=1, program=program)
        world.drive(program, scenario.begin_s + 1200)
        delays[program] = world.trips().delay_s
    assert delays["actuated"] < delays["fixed"]


def test_lookahead_beats_the_controllers_it_branches_with(world):
    delays = {}
    scenario = load_scenario("resco:ingolstadt1")
    for controller in ("max_wave", "max_pressure", "lookahead"):
        world.reset(scenario, seed=1)
        world.drive(controller, scenario.begin_s + 400, horizon_s=30)
        delays[controller] = world.trips().delay_s
    assert delays["lookahead"] < min(delays["max_wave"], delays["max_pressure"])


def test_a_junction_under_its_own_program_takes_no_action(world):
    world.reset(load_scenario("generated:1"), seed=1, program="fixed")
    tls_id = world.decisions()[0].junction.tls_id
    with pytest.raises(UserError, match="cannot be chosen"):
        world.step({tls_id: Action(phase=0)})
