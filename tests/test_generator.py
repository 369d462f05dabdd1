"""Generated cities and grids are sound and repeatable."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from envs import generator
from envs.city import draw_city, streams
from envs.errors import UserError
from envs.program import is_green
from envs.scenario import load_scenario, validate_scenario
from envs.types import Scenario

SEEDS = range(1, 9)
GRIDS = range(1, 4)
"""Two rows with further greens, and two streets that cross two others."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scenarios")


@pytest.fixture(scope="module")
def cities(cache) -> dict[str, Scenario]:
    names = [f"generated:{seed}" for seed in SEEDS] + [f"grid:{seed}" for seed in GRIDS]
    return {name: load_scenario(name, cache_dir=cache) for name in names}


def programs(net_file: str) -> list[list[str]]:
    """Signal states of every program of a network."""
    root = ET.parse(net_file).getroot()
    return [[phase.get("state", "") for phase in logic] for logic in root.iter("tlLogic")]


@pytest.mark.parametrize("name", ["generated:3", "grid:2"])
def test_same_seed_gives_the_same_bytes_elsewhere(cities, tmp_path, name):
    again = load_scenario(name, cache_dir=tmp_path)
    for ours, theirs in (
        (again.net_file, cities[name].net_file),
        (again.route_files[0], cities[name].route_files[0]),
    ):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()


def test_every_generated_city_is_valid(cities):
    for city in cities.values():
        validate_scenario(city)
        assert (city.kind, city.begin_s, city.end_s) == ("generated", 0.0, 3600.0)


def test_every_generated_signal_has_two_greens_or_more(cities):
    for city in cities.values():
        for states in programs(city.net_file):
            assert len({state for state in states if is_green(state)}) >= 2


def test_generated_cities_differ(cities):
    shapes = {str(programs(city.net_file)) for city in cities.values()}
    assert len(shapes) == len(cities)


def test_every_sixth_city_has_two_junctions(cities):
    assert {seed: len(programs(cities[f"generated:{seed}"].net_file)) for seed in SEEDS} == {
        seed: 2 if seed % 6 == 0 else 1 for seed in SEEDS
    }


def test_an_approach_with_a_green_of_its_own_has_it_beside_the_shared_ones(tmp_path):
    shared = replace(draw_city(3), own_greens="none")
    counts = {}
    for own in ("none", "main", "all"):
        folder = tmp_path / own
        folder.mkdir()
        generator._build(replace(shared, own_greens=own), folder)
        [states] = programs(str(folder / generator.NET_NAME))
        greens = [state for state in states if is_green(state)]
        assert len({state.upper() for state in greens}) == len(greens)
        counts[own] = len(greens)
    assert counts["none"] == 4
    assert counts["main"] == 6
    assert counts["all"] == 8


def test_demand_does_not_depend_on_further_greens(tmp_path):
    written = set()
    for own in ("none", "all"):
        folder = tmp_path / own
        folder.mkdir()
        generator._build(replace(draw_city(3), own_greens=own), folder)
        written.add((folder / generator.ROUTES_NAME).read_bytes())
    assert len(written) == 1


def test_every_tenth_city_may_have_further_greens():
    further = {seed for seed in range(1, 97) if draw_city(seed).own_greens != "none"}
    assert all(seed % 10 == 0 for seed in further)
    assert len(further) >= 6


def test_a_side_road_takes_vehicles_away_before_the_signal(tmp_path):
    seed = next(
        seed
        for seed in range(1, 97)
        if any(len(arm.turn_offs_vph) == 2 for c in draw_city(seed).crossings for arm in c.arms)
    )
    city = generator.generate(seed, tmp_path)
    root = ET.parse(city.route_files[0]).getroot()
    away = {r.get("id"): r.get("edges").split() for r in root.iter("route")}
    away = {name: edges for name, edges in away.items() if edges[-1].startswith("side")}
    assert {flow.get("route") for flow in root.iter("flow")} >= away.keys()
    for edges in away.values():
        arm = edges[-1].removeprefix("side").rpartition("_")[0]
        assert edges[-2] == f"in{arm}_1"


def test_no_green_turns_red_without_yellow(cities):
    for city in cities.values():
        for states in programs(city.net_file):
            for before, after in zip(states, states[1:] + states[:1], strict=True):
                pairs = set(zip(before, after, strict=True))
                assert not pairs & {("G", "r"), ("g", "r"), ("r", "y")}


def test_links_with_right_of_way_never_cross(cities):
    for city in cities.values():
        root = ET.parse(city.net_file).getroot()
        for logic in root.iter("tlLogic"):
            node = next(j for j in root.iter("junction") if j.get("id") == logic.get("id"))
            response = [r.get("response", "")[::-1] for r in node.iter("request")]
            for phase in logic:
                green = [i for i, light in enumerate(phase.get("state", "")) if light == "G"]
                assert not [(i, j) for i in green for j in green if response[i][j] == "1"]


def test_some_greens_open_only_a_part_of_a_lane(cities):
    """Lock-in lives here: the first vehicle of the lane may want the other part."""
    mixed = 0
    for city in cities.values():
        root = ET.parse(city.net_file).getroot()
        for logic in root.iter("tlLogic"):
            links = [c for c in root.iter("connection") if c.get("tl") == logic.get("id")]
            for phase in logic:
                state = phase.get("state", "")
                lanes: dict[tuple[str | None, str | None], set[bool]] = {}
                for link in links:
                    lane = (link.get("from"), link.get("fromLane"))
                    opened = state[int(link.get("linkIndex", ""))] in "Gg"
                    lanes.setdefault(lane, set()).add(opened)
                mixed += is_green(state) and {True, False} in lanes.values()
    assert mixed > 0


def test_shares_of_an_arm_sum_to_one_and_no_vehicle_is_lost():
    for seed in range(1, 41):
        city = draw_city(seed)
        for crossing in city.crossings:
            for arm in crossing.arms:
                assert sum(m.share for m in arm.movements) == pytest.approx(1.0)
                assert sum(arm.profile) / len(arm.profile) == pytest.approx(1.0)
        arms = [arm for crossing in city.crossings for arm in crossing.arms]
        entering = sum(arm.rate_vph + sum(arm.turn_offs_vph) for arm in arms)
        assert sum(stream.rate_vph for stream in streams(city)) == pytest.approx(entering)


def test_some_roads_begin_just_before_the_signal_and_some_vehicles_find_their_lane_late():
    drawn = [draw_city(seed) for seed in range(1, 41)]
    assert {city.late_lanes for city in drawn} == {True, False}
    arms = [arm for city in drawn for crossing in city.crossings for arm in crossing.arms]
    short = [arm for arm in arms if sum(arm.segments_m) < 130 and arm.rate_vph > 0]
    assert 0.1 < len(short) / len(arms) < 0.3
    assert min(arm.segments_m[0] for arm in short) < generator.SHORT_EXIT_M


def test_late_lanes_leave_lane_and_speed_of_entry_to_sumo(tmp_path):
    for late in (False, True):
        city = replace(draw_city(1), late_lanes=late)
        generator._write_demand(city, tmp_path / "a.rou.xml", 1.0)
        flows = ET.parse(tmp_path / "a.rou.xml").getroot().findall("flow")
        assert flows
        for flow in flows:
            assert ("departLane" in flow.attrib) == ("departSpeed" in flow.attrib) == (not late)


def test_concurrent_callers_get_one_complete_city(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: generator.generate(2, tmp_path), range(4)))
    assert len(made) == 1
    assert [p.name for p in (tmp_path / generator.fingerprint()).iterdir()] == ["generated-2"]


def test_cached_city_is_not_built_again(cities, cache, monkeypatch):
    monkeypatch.setitem(generator.KINDS, "generated", lambda _: pytest.fail("drawn again"))
    assert load_scenario("generated:1", cache_dir=cache) == cities["generated:1"]


def test_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "sumo_tool", lambda _: "/bin/false")
    with pytest.raises(RuntimeError, match="netconvert failed"):
        generator.generate(1, tmp_path)
    assert not list((tmp_path / generator.fingerprint()).iterdir())


@pytest.mark.parametrize(("load", "direction"), [(0.75, -1), (0.08, 1)])
def test_demand_out_of_bounds_is_scaled_towards_them(tmp_path, monkeypatch, load, direction):
    delays_s = []
    measure = generator._measure_delay
    monkeypatch.setattr(
        generator, "_measure_delay", lambda *a: delays_s.append(measure(*a)) or delays_s[-1]
    )
    monkeypatch.setitem(generator.KINDS, "generated", lambda s: replace(draw_city(s), load=load))
    generator.generate(2, tmp_path)
    assert direction * (delays_s[-1] - delays_s[0]) > 0
    low_s, high_s = generator.DELAY_BOUNDS_S
    assert len(delays_s) == generator.MAX_TRIES or low_s <= delays_s[-1] <= high_s


def test_simulation_seed_changes_the_vehicles(cities, tmp_path):
    counts = set()
    for seed in (1, 2):
        trips = tmp_path / f"{seed}.xml"
        subprocess.run(
            [
                generator.sumo_tool("sumo"),
                *("-n", cities["generated:1"].net_file, "-r", cities["generated:1"].route_files[0]),
                *("--seed", str(seed), "--end", "600", "--tripinfo-output", str(trips)),
                *("--no-step-log", "--no-warnings"),
            ],
            check=True,
        )
        counts.add(tuple(re.findall(r'depart="([\d.]+)"', trips.read_text())))
    assert len(counts) == 2


def test_missing_simulator_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="eclipse-sumo"):
        generator.sumo_tool("netconvert")
