"""What a user's own files may hold beyond what generated cities do."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import UserError
from envs.generator import sumo_tool
from envs.scenario import load_scenario
from envs.types import JunctionSpec, Scenario
from envs.world import World

OTHER_GREENS = {"G": "r", "g": "r", "r": "G"}


@pytest.fixture
def city() -> Scenario:
    return load_scenario("generated:2")


def junctions(scenario: Scenario) -> tuple[JunctionSpec, ...]:
    with World() as world:
        return world.reset(scenario, seed=1)


def test_lanes_that_share_one_light_are_all_seen(city, tmp_path):
    grouped = tmp_path / "grouped.net.xml"
    command = [sumo_tool("netconvert"), "-s", city.net_file, "--tls.group-signals", "-o", grouped]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    [own], [shared] = junctions(city), junctions(replace(city, net_file=str(grouped)))
    assert len(shared.phases[0].state) < len(own.phases[0].state)
    assert {lane.lane_id for lane in shared.lanes} == {lane.lane_id for lane in own.lanes}


def test_phases_are_those_of_the_program_that_runs(city, tmp_path):
    net = ET.parse(city.net_file).getroot()
    [logic] = net.findall("tlLogic")
    logic.set("programID", "another")
    for phase in list(logic)[2:]:
        logic.remove(phase)
    for phase in logic:
        phase.set("state", "".join(OTHER_GREENS.get(light, "r") for light in phase.get("state")))
    logic[0].set("state", "G" * len(logic[0].get("state")))
    additional = tmp_path / "programs.add.xml"
    additional.write_text(f"<additional>{ET.tostring(logic, encoding='unicode')}</additional>")
    [junction] = junctions(replace(city, additional_files=(str(additional),)))
    assert {phase.state for phase in junction.phases} == {phase.get("state") for phase in logic}


def written(city: Scenario, folder: Path, flow: str, settings: str = "") -> Scenario:
    """The city with one flow on its first route, as a `.sumocfg` of an hour."""
    route = ET.parse(city.route_files[0]).getroot().find(".//route")
    (folder / "my.rou.xml").write_text(
        f'<routes><route id="r" edges="{route.get("edges")}"/>'
        f'<flow id="f" route="r" {flow}/></routes>'
    )
    config = folder / "my.sumocfg"
    config.write_text(
        f'<configuration><input><net-file value="{city.net_file}"/>'
        '<route-files value="my.rou.xml"/></input>'
        f'<time><begin value="600"/><end value="4200"/></time>{settings}</configuration>'
    )
    return load_scenario(str(config))


@pytest.mark.parametrize(
    ("flow", "num"),
    [('number="300"', 300), ('number="100" period="5"', 100), ('period="0:00:30"', 120)],
)
def test_a_flow_brings_as_many_vehicles_as_it_does_in_sumo(city, tmp_path, flow, num):
    scenario = written(city, tmp_path, flow)
    with World() as world:
        world.reset(scenario, seed=1)
        world.drive("max_wave", scenario.end_s)
        assert world.trips().num_trips == pytest.approx(num, abs=1)


@pytest.mark.parametrize("rate", ['period="0"', 'vehsPerHour="many"', 'period="exp(x)"'])
def test_a_flow_with_no_rate_is_named(city, tmp_path, rate):
    with pytest.raises(UserError, match="flow f"):
        written(city, tmp_path, rate)


def test_nobody_who_waits_to_enter_is_forgotten(city, tmp_path):
    """However long: SUMO would drop them after 10 s, and a junction that keeps them out would
    look good."""
    settings = '<processing><max-depart-delay value="10"/></processing>'
    scenario = written(city, tmp_path, 'number="3600"', settings)
    assert scenario.options == ()
    with World() as world:
        world.reset(scenario, seed=1)
        world.drive("max_wave", scenario.end_s)
        assert world.trips().num_trips == pytest.approx(3600, abs=2)


def test_a_scale_that_is_no_number_is_named(city, tmp_path):
    settings = '<processing><scale value="1,5"/></processing>'
    with pytest.raises(UserError, match=r"scale as a number.*'1,5'"):
        written(city, tmp_path, 'number="9"', settings)


def test_steps_that_do_not_divide_a_second_are_refused_before_anything_runs(city, tmp_path):
    settings = '<time><begin value="0"/><end value="9"/><step-length value="0.3"/></time>'
    with pytest.raises(UserError, match="must divide one second"):
        written(city, tmp_path, 'number="9"', settings)


def test_files_whose_names_have_spaces_are_found(city, tmp_path):
    home = tmp_path / "my town"
    home.mkdir()
    assert written(city, home, 'number="9"').route_files == (str(home / "my.rou.xml"),)
