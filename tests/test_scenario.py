"""Scenarios: names are understood, and users are told what is wrong with their files."""

from __future__ import annotations

import gzip
import importlib.util
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from envs import scenario
from envs.errors import UserError
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

INPUT = '<input><net-file value="my.net.xml"/><route-files value="my.rou.xml"/></input>'


@pytest.fixture
def city() -> Scenario:
    return load_scenario("generated:1")


@pytest.fixture
def files(city, tmp_path) -> tuple[Path, Path]:
    """A user's own network and routes, free to be broken."""
    net, routes = tmp_path / "my.net.xml", tmp_path / "my.rou.xml"
    net.write_bytes(Path(city.net_file).read_bytes())
    routes.write_bytes(Path(city.route_files[0]).read_bytes())
    return net, routes


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


# Names


def test_cache_follows_the_user_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scenario.default_cache_dir() == tmp_path / "rl-ft" / "scenarios"


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


def test_window_that_ends_before_it_begins_is_refused(city):
    with pytest.raises(UserError, match="not after its begin"):
        validate_scenario(replace(city, begin_s=10.0, end_s=10.0))


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


def test_demand_outside_the_window_is_refused(city):
    with pytest.raises(UserError, match="No vehicle"):
        validate_scenario(replace(city, begin_s=5000.0, end_s=6000.0))


def test_broken_additional_file_is_refused(city, tmp_path):
    broken = tmp_path / "broken.add.xml"
    broken.write_text("<additional>")
    with pytest.raises(UserError, match=r"broken\.add\.xml"):
        validate_scenario(replace(city, additional_files=(str(broken),)))
