"""Scenarios: generated cities are sound and repeatable, users are told what is wrong."""

from __future__ import annotations

import gzip
import importlib.util
import re
import subprocess
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from envs import generator, scenario
from envs.city import draw_city, streams
from envs.errors import UserError
from envs.program import is_green
from envs.scenario import (
    expand,
    load_scenario,
    require_scenarios,
    scenario_names,
    traffic,
    validate_scenario,
)
from envs.types import Scenario
from envs.world import World

SEEDS = range(1, 9)
INPUT = '<input><net-file value="my.net.xml"/><route-files value="my.rou.xml"/></input>'


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scenarios")


@pytest.fixture(scope="module")
def cities(cache) -> dict[int, Scenario]:
    return {seed: load_scenario(f"generated:{seed}", cache_dir=cache) for seed in SEEDS}


@pytest.fixture
def files(cities, tmp_path) -> tuple[Path, Path]:
    """A user's own network and routes, free to be broken."""
    net, routes = tmp_path / "my.net.xml", tmp_path / "my.rou.xml"
    net.write_bytes(Path(cities[1].net_file).read_bytes())
    routes.write_bytes(Path(cities[1].route_files[0]).read_bytes())
    return net, routes


def programs(net_file: str) -> list[list[str]]:
    """Signal states of every program of a network."""
    root = ET.parse(net_file).getroot()
    return [[phase.get("state", "") for phase in logic] for logic in root.iter("tlLogic")]


def write_config(folder: Path, text: str) -> str:
    path = folder / "my.sumocfg"
    path.write_text(f"<configuration>{text}</configuration>")
    return str(path)


def complaint(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load_scenario(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Generated cities


def test_same_seed_gives_the_same_bytes_elsewhere(cities, tmp_path):
    again = generator.generate(3, tmp_path)
    for ours, theirs in (
        (again.net_file, cities[3].net_file),
        (again.route_files[0], cities[3].route_files[0]),
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
    assert {seed: len(programs(city.net_file)) for seed, city in cities.items()} == {
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
    monkeypatch.setattr(generator, "draw_city", lambda _: pytest.fail("drawn again"))
    assert load_scenario("generated:1", cache_dir=cache) == cities[1]


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
    monkeypatch.setattr(generator, "draw_city", lambda s: replace(draw_city(s), load=load))
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
                *("-n", cities[1].net_file, "-r", cities[1].route_files[0]),
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


def test_cache_follows_the_user_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scenario.default_cache_dir() == tmp_path / "rl-ft" / "scenarios"


# Names


def test_a_repeated_name_stands_for_as_many():
    names = ("generated:1-2*2", "resco:cologne1*3", "my*.sumocfg")
    assert expand(names) == (
        *("generated:1", "generated:2") * 2,
        *("resco:cologne1",) * 3,
        "my*.sumocfg",
    )


def test_ranges_are_expanded_in_place():
    assert expand(["generated:1-3", "resco:cologne1", "generated:7"]) == (
        "generated:1",
        "generated:2",
        "generated:3",
        "resco:cologne1",
        "generated:7",
    )


@pytest.mark.parametrize("name", ["generated:5-1", "generated:1-99999"])
def test_ranges_that_make_no_sense_are_refused(name):
    with pytest.raises(UserError, match=name):
        expand([name])


@pytest.mark.parametrize(
    "name", ["generated:a", "generated:-1", "generated:", "generated:1-3", "generated:9999999999"]
)
def test_generated_wants_one_seed(name):
    assert "one seed" in complaint(name)


@pytest.mark.parametrize("name", ["nonsense:1", "cologne1", "", "my.net.xml"])
def test_unknown_kind_lists_what_there_is(name):
    message = complaint(name)
    assert "generated:<seed>" in message
    assert "resco:<map>" in message


# How often junctions choose


@pytest.mark.parametrize("name", ["generated:7", "resco:arterial4x4"])
def test_a_pace_changes_how_often_junctions_choose_and_nothing_else(name):
    plain, paced = load_scenario(name), load_scenario(f"{name}@15")
    assert paced.timing.decision_interval_s == 15
    timing = replace(plain.timing, decision_interval_s=15)
    assert paced == replace(plain, name=f"{name}@15", timing=timing)


def test_junctions_choose_at_the_pace_that_was_asked_for():
    scenario = load_scenario("generated:7@15")
    with World() as world:
        world.reset(scenario, seed=1)
        world.drive("max_wave", scenario.begin_s + 1)
        assert world.time()[0] == scenario.begin_s + 15


@pytest.mark.parametrize("name", ["generated:7@3", "generated:7@121", "resco:arterial4x4@2"])
def test_a_pace_within_the_yellow_or_beyond_the_maximum_green_is_refused(name):
    assert "can choose every" in complaint(name)
    with pytest.raises(UserError, match=name):
        require_scenarios([name])


def test_a_range_and_a_repetition_keep_their_pace():
    assert expand(["generated:1-2@5*2"]) == ("generated:1@5", "generated:2@5") * 2


# How many vehicles there are


def test_a_share_multiplies_the_scale_of_a_scenario_and_changes_nothing_else():
    plain, busier = load_scenario("generated:7"), load_scenario("generated:7%150")
    assert busier == replace(plain, name="generated:7%150", options=(("scale", "1.5"),))


def test_half_as_many_vehicles_again_enter_where_that_was_asked_for():
    def entered(name: str) -> int:
        scenario = load_scenario(name)
        with World() as world:
            world.reset(scenario, seed=1)
            world.drive("max_wave", scenario.end_s)
            return world.trips().num_trips

    assert entered("generated:7%150") == pytest.approx(1.5 * entered("generated:7"), rel=0.1)


def test_a_range_and_a_repetition_keep_their_share_and_pace():
    assert expand(["generated:1-2%140@5*2"]) == ("generated:1%140@5", "generated:2%140@5") * 2


def test_more_vehicles_are_other_traffic():
    assert traffic("generated:7%150@5") == "generated:7%150" != traffic("generated:7")


def test_other_spellings_of_a_city_are_the_same_traffic():
    assert traffic("generated:007%100") == traffic("generated:7")


@pytest.mark.parametrize(
    "name", ["generated:7%9", "generated:7%1000", "generated:7@5%150", "resco:cologne1%150%150"]
)
def test_a_share_that_cannot_be_read_is_refused(name):
    with pytest.raises(UserError, match=re.escape(name)):
        require_scenarios([name])


# RESCO


def test_installed_maps_are_listed_and_valid():
    names = scenario_names()
    assert names[:2] == ("generated:<seed>", "grid:<seed>")
    assert len(names) == 10
    for name in names[2:]:
        validate_scenario(load_scenario(name))


def test_maps_run_in_their_own_window_and_rhythm():
    cologne, arterial = load_scenario("resco:cologne1"), load_scenario("resco:arterial4x4")
    assert (cologne.begin_s, cologne.end_s) == (25200.0, 28800.0)
    assert (cologne.timing.decision_interval_s, cologne.timing.yellow_s) == (10, 3)
    assert (arterial.timing.decision_interval_s, arterial.timing.yellow_s) == (5, 2)


def test_unknown_map_lists_the_known_ones():
    assert "cologne1" in complaint("resco:berlin")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'rl-ft[resco]'" in complaint("resco:cologne1")
    assert scenario_names() == ("generated:<seed>", "grid:<seed>")


def test_incomplete_package_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(scenario, "_resco_root", lambda: tmp_path)
    assert "no complete map cologne1" in complaint("resco:cologne1")


# The user's own files


def test_network_and_routes_run_while_vehicles_depart(files):
    net, routes = files
    loaded = load_scenario(f"{net},{routes}")
    assert loaded.kind == "user"
    assert (loaded.net_file, loaded.route_files) == (str(net), (str(routes),))
    assert (loaded.begin_s, loaded.end_s) == (0.0, 3601.0)


def test_configuration_is_read_relative_to_its_folder(files, tmp_path):
    (tmp_path / "extra.add.xml").write_text("<additional/>")
    name = write_config(
        tmp_path,
        '<input><net-file value="my.net.xml"/><route-files value="my.rou.xml"/>'
        '<additional-files value="extra.add.xml"/></input>'
        '<time><begin value="0:05:00"/><end value="900"/><step-length value="0.5"/></time>',
    )
    loaded = load_scenario(name)
    assert loaded.net_file == str(tmp_path / "my.net.xml")
    assert loaded.additional_files == (str(tmp_path / "extra.add.xml"),)
    assert (loaded.begin_s, loaded.end_s, loaded.step_length_s) == (300.0, 900.0, 0.5)


def test_zipped_files_are_read(files, tmp_path):
    zipped = []
    for path in files:
        zipped.append(tmp_path / f"{path.name}.gz")
        zipped[-1].write_bytes(gzip.compress(path.read_bytes()))
    assert load_scenario(f"{zipped[0]},{zipped[1]}").end_s == 3601.0


def test_missing_files_are_named(files, tmp_path):
    net, routes = files
    assert "gone.rou.xml" in complaint(f"{net},{tmp_path}/gone.rou.xml")
    assert "gone.net.xml" in complaint(f"{tmp_path}/gone.net.xml,{routes}")
    assert "gone.sumocfg does not exist" in complaint(f"{tmp_path}/gone.sumocfg")


@pytest.mark.parametrize("broken", [0, 1])
def test_broken_xml_is_named(files, broken):
    files[broken].write_text("<net><edge id='a'>")
    message = complaint(f"{files[0]},{files[1]}")
    assert files[broken].name in message
    assert "not readable XML" in message


def test_broken_archive_is_named(files, tmp_path):
    zipped = tmp_path / "my.net.xml.gz"
    zipped.write_text("no archive")
    assert "not readable XML" in complaint(f"{zipped},{files[1]}")


def test_broken_configuration_is_named(tmp_path):
    assert "not readable XML" in complaint(write_config(tmp_path, "<input>"))


def test_configuration_without_files_is_refused(tmp_path):
    assert "one net-file" in complaint(write_config(tmp_path, ""))


def test_configuration_with_a_strange_time_is_refused(files, tmp_path):
    for text in ("noon", "1:30"):
        name = write_config(
            tmp_path,
            '<net-file value="my.net.xml"/><route-files value="my.rou.xml"/>'
            f'<begin value="{text}"/>',
        )
        assert f"{text!r}" in complaint(name)


def test_window_that_ends_before_it_begins_is_refused(cities):
    with pytest.raises(UserError, match="not after its begin"):
        validate_scenario(replace(cities[1], begin_s=10.0, end_s=10.0))


def test_network_that_is_none_is_refused(files):
    files[0].write_text("<routes/>")
    assert "has no edge" in complaint(f"{files[0]},{files[1]}")


def test_network_without_signals_is_refused(files):
    text = re.sub(r"<tlLogic.*?</tlLogic>", "", files[0].read_text(), flags=re.DOTALL)
    files[0].write_text(text)
    assert "no traffic light" in complaint(f"{files[0]},{files[1]}")


def test_network_whose_signals_have_no_choice_is_refused(files):
    text = re.sub(r'state="[GgryYu]+"', 'state="GG"', files[0].read_text())
    files[0].write_text(text)
    assert "two green phases" in complaint(f"{files[0]},{files[1]}")


@pytest.mark.parametrize(
    ("demand", "edge"),
    [
        ('<vehicle id="v" depart="1"><route edges="in0_0_0 nowhere"/></vehicle>', "nowhere"),
        ('<trip id="t" depart="1" from="elsewhere" to="in0_0_0"/>', "elsewhere"),
        ('<flow id="f" begin="0" end="9" number="3" from="in0_0_0" to="gone"/>', "gone"),
    ],
)
def test_routes_of_another_network_are_refused(files, demand, edge):
    files[1].write_text(f"<routes>{demand}</routes>")
    message = complaint(f"{files[0]},{files[1]}")
    assert f"edge '{edge}'" in message
    assert "do not belong together" in message


def test_routes_without_a_vehicle_are_refused(files):
    files[1].write_text('<routes><route id="r" edges="in0_0_0"/></routes>')
    assert "there is none" in complaint(f"{files[0]},{files[1]}")


def test_a_flow_without_an_end_asks_for_one(files):
    edge = ET.parse(files[1]).getroot().find(".//route").get("edges").split()[0]
    flow = f'<flow id="f" begin="5" vehsPerHour="60" from="{edge}" to="{edge}"/>'
    files[1].write_text(f"<routes>{flow}</routes>")
    assert "give the flow an end" in complaint(f"{files[0]},{files[1]}")


def test_a_flow_without_an_end_lasts_as_long_as_the_window(files, tmp_path):
    edge = ET.parse(files[1]).getroot().find(".//route").get("edges").split()[0]
    flow = f'<flow id="f" vehsPerHour="60" from="{edge}" to="{edge}"/>'
    files[1].write_text(f"<routes>{flow}</routes>")
    name = write_config(tmp_path, INPUT + '<time><begin value="900"/><end value="1800"/></time>')
    assert (load_scenario(name).begin_s, load_scenario(name).end_s) == (900.0, 1800.0)


def test_how_vehicles_move_is_taken_from_the_configuration(files, tmp_path):
    assert files[0].is_file()
    moving = '<processing><scale value="2"/><threads value="4"/></processing>'
    name = write_config(tmp_path, INPUT + moving + '<output><fcd-output value="x.xml"/></output>')
    loaded = load_scenario(name)
    assert loaded.options == (("scale", "2"),)
    assert load_scenario(f"{name}%50").options == (("scale", "1"),)
    num_trips = []
    for played in (replace(loaded, options=()), loaded):
        with World() as world:
            world.reset(played, seed=1)
            world.drive("max_wave", played.end_s)
            num_trips.append(world.trips().num_trips)
    assert num_trips[1] == pytest.approx(2 * num_trips[0], rel=0.05)


def test_names_of_the_same_traffic_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert traffic("my.sumocfg@15") == traffic("./my.sumocfg") == str(tmp_path / "my.sumocfg")
    assert traffic("generated:7@15") == traffic("generated:7")
    assert traffic("a.net.xml, b.rou.xml") == traffic("./a.net.xml,./b.rou.xml")


def test_demand_outside_the_window_is_refused(cities):
    with pytest.raises(UserError, match="No vehicle"):
        validate_scenario(replace(cities[1], begin_s=5000.0, end_s=6000.0))


def test_broken_additional_file_is_refused(cities, tmp_path):
    broken = tmp_path / "broken.add.xml"
    broken.write_text("<additional>")
    with pytest.raises(UserError, match=r"broken\.add\.xml"):
        validate_scenario(replace(cities[1], additional_files=(str(broken),)))
