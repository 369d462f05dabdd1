"""Grids: several generated junctions whose streets meet, and traffic that crosses them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from envs.city import GRID_SHAPES, MAX_TURNS, City, draw_grid, streams
from envs.dialect import FULL_BELOW
from envs.scenario import (
    expand,
    is_generated,
    load_scenario,
    require_scenarios,
    traffic,
)
from envs.types import Action, Observation
from envs.world import World


def turns(city: City, start: tuple[int, int], path) -> list[str]:
    """How a vehicle turns at each junction on its way."""
    crossing, arm = start
    taken = []
    for c, to_arm in path:
        assert c == crossing
        moves = city.crossings[c].arms[arm].movements
        taken.append(next(m.turn for m in moves if m.to_arm == to_arm))
        crossing, arm = city.leads_to(c, to_arm) or (-1, -1)
    return taken


def test_every_shape_is_drawn():
    shapes = set()
    for seed in range(1, 41):
        crossings = draw_grid(seed).crossings
        shapes.add((len({c.y_m for c in crossings}), len({c.x_m for c in crossings})))
    assert shapes == set(GRID_SHAPES)


def test_a_grid_has_a_signal_at_every_junction():
    for seed in (1, 3):
        net = ET.parse(load_scenario(f"grid:{seed}").net_file)
        assert len(list(net.iter("tlLogic"))) == len(draw_grid(seed).crossings) >= 3


def test_a_grid_is_another_city_than_the_generated_one_of_its_seed():
    city, grid = load_scenario("generated:1"), load_scenario("grid:1")
    assert Path(city.net_file).parent != Path(grid.net_file).parent
    assert traffic("generated:1") != traffic("grid:1") == traffic("grid:01@5")


def test_both_ends_of_a_street_agree():
    for seed in range(1, 21):
        city = draw_grid(seed)
        for c, crossing in enumerate(city.crossings):
            for a, arm in enumerate(crossing.arms):
                if arm.leads_to is not None:
                    there, back = arm.leads_to
                    other = city.crossings[there].arms[back]
                    assert other.leads_to == (c, a)
                    assert (other.lanes_in, other.segments_m) == (arm.lanes_in, arm.segments_m)
                    assert other.lanes_out == arm.lanes_in


def test_no_vehicle_is_lost():
    for seed in range(1, 21):
        city = draw_grid(seed)
        arms = [arm for crossing in city.crossings for arm in crossing.arms]
        entering = sum(arm.rate_vph + sum(arm.turn_offs_vph) for arm in arms)
        assert sum(stream.rate_vph for stream in streams(city)) == pytest.approx(entering)


def test_nobody_comes_to_a_junction_twice_or_keeps_turning():
    city = draw_grid(7)
    for stream in streams(city):
        passed = [c for c, _ in stream.path]
        assert len(set(passed)) == len(passed)
        taken = turns(city, stream.entry, stream.path)
        assert sum(turn != "through" for turn in taken) <= MAX_TURNS
    assert any(len(stream.path) > 3 for stream in streams(city))


def test_more_vehicles_fill_roads_between_junctions():
    """What grids are for: somewhere a green is of no use, because there is no room behind."""
    with World() as world:
        world.reset(load_scenario("grid:2%140@5"), seed=1)
        full = 0
        while not full and not world.time()[1]:
            world.drive("max_wave", world.time()[0] + 60)
            free = [min(d.observation.downstream_free) for d in world.decisions()]
            full = sum(share < FULL_BELOW for share in free)
    assert full > 0


def test_names_of_grids_are_understood_like_those_of_cities():
    assert expand(["grid:1-2%140@5"]) == ("grid:1%140@5", "grid:2%140@5")
    assert is_generated("grid:3@5")
    assert not is_generated("resco:grid4x4")
    require_scenarios(["grid:3"])


def seen_after(world: World, rngs: str | None, choice: int) -> list[Observation]:
    """What the nine junctions of a grid see 30 s after the first has chosen, while the others keep
    what they show."""
    scenario = load_scenario("grid:7%140")
    if rngs is not None:
        scenario = replace(scenario, options=(*scenario.options, ("thread-rngs", rngs)))
    world.reset(scenario, seed=1)
    world.drive("max_wave", 600)
    first = world.decisions()[0]
    world.step({first.junction.tls_id: Action(phase=first.legal[choice])})
    for _ in range(2):
        world.step({})
    return [decision.observation for decision in world.decisions()]


@pytest.mark.parametrize(("rngs", "same"), [(None, True), ("1", False)])
def test_a_choice_changes_nobodys_dice_far_away(rngs, same):
    """SUMO's lanes share generators of random numbers unless there is one for each."""
    with World() as world:
        one, other = (seen_after(world, rngs, choice) for choice in (0, -1))
    assert one[0] != other[0]
    # The third of a row of three, and the last row.
    far = (2, 6, 7, 8)
    assert ([one[i] for i in far] == [other[i] for i in far]) == same
