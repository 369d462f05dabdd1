"""Grids: several generated junctions whose streets meet, and traffic that crosses them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
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
    validate_scenario,
)
from envs.signals import green_states
from envs.types import Scenario
from envs.world import World

SEEDS = (1, 2, 3)
"""Two rows with further greens, and two streets that cross two others."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scenarios")


@pytest.fixture(scope="module")
def grids(cache) -> dict[int, Scenario]:
    return {seed: load_scenario(f"grid:{seed}", cache_dir=cache) for seed in SEEDS}


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
    sizes = {len(draw_grid(seed).crossings) for seed in range(1, 41)}
    assert sizes == {rows * columns for rows, columns in GRID_SHAPES}


def test_every_grid_is_valid_and_has_a_signal_at_every_junction(grids):
    for seed, grid in grids.items():
        validate_scenario(grid)
        assert (grid.name, grid.kind) == (f"grid:{seed}", "generated")
        signals = list(ET.parse(grid.net_file).getroot().iter("tlLogic"))
        assert len(signals) == len(draw_grid(seed).crossings) >= 3


def test_same_seed_gives_the_same_bytes_elsewhere(grids, tmp_path):
    again = load_scenario("grid:2", cache_dir=tmp_path)
    for ours, theirs in (
        (again.net_file, grids[2].net_file),
        (again.route_files[0], grids[2].route_files[0]),
    ):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()


def test_a_grid_is_another_city_than_the_generated_one_of_its_seed(grids, cache):
    city = load_scenario("generated:1", cache_dir=cache)
    assert Path(city.net_file).parent != Path(grids[1].net_file).parent
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


def test_links_with_right_of_way_never_cross_and_greens_end_in_yellow(grids):
    for grid in grids.values():
        root = ET.parse(grid.net_file).getroot()
        for logic in root.iter("tlLogic"):
            node = next(j for j in root.iter("junction") if j.get("id") == logic.get("id"))
            response = [r.get("response", "")[::-1] for r in node.iter("request")]
            states = [phase.get("state", "") for phase in logic]
            assert len(green_states(states)) >= 2
            for state, following in zip(states, states[1:] + states[:1], strict=True):
                green = [i for i, light in enumerate(state) if light == "G"]
                assert not [(i, j) for i in green for j in green if response[i][j] == "1"]
                assert not set(zip(state, following, strict=True)) & {("G", "r"), ("g", "r")}


def test_more_vehicles_fill_roads_between_junctions(grids):
    """What grids are for: somewhere a green is of no use, because there is no room behind."""
    scenario = load_scenario("grid:2%140@5", cache_dir=Path(grids[2].net_file).parents[2])
    with World() as world:
        world.reset(scenario, seed=1)
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
