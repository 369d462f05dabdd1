from __future__ import annotations

import gzip

import pytest
from rich.console import Console

from envs.types import Scenario
from rl_ft.listing import list_recipes, list_scenarios, num_departures, show_scenario


def shown(show, *arguments):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, *arguments)
    return console.export_text()


def scenario(file):
    return Scenario(
        name="mine",
        kind="user",
        net_file="unused.net.xml",
        route_files=(str(file),),
        begin_s=0,
        end_s=3600,
    )


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ('<vehicle id="a" depart="10"/><trip id="b" depart="0:30:00"/>', 2),
        ('<vehicle id="a" depart="3600"/><vehicle id="b" depart="triggered"/>', 0),
        ('<flow id="f" begin="0" end="7200" number="100"/>', 50),
        ('<flow id="f" begin="0" end="1800" vehsPerHour="100"/>', 50),
        ('<flow id="f" begin="1800" probability="0.1"/>', 180),
        ('<flow id="f" begin="0" end="3600" period="10"/>', 360),
        ('<flow id="f" begin="0" end="3600" period="exp(0.5)"/>', 1800),
    ],
)
def test_demand_is_what_departs_in_the_window(demand, expected, tmp_path):
    file = tmp_path / "mine.rou.xml"
    file.write_text(f"<routes>{demand}</routes>")
    assert num_departures(scenario(file)) == pytest.approx(expected)


def test_compressed_demand_is_counted_too(tmp_path):
    file = tmp_path / "mine.rou.xml.gz"
    file.write_bytes(gzip.compress(b'<routes><vehicle id="a" depart="1"/></routes>'))
    assert num_departures(scenario(file)) == 1


def test_a_generated_scenario_shows_its_phases_and_what_a_model_reads():
    text = shown(show_scenario, "generated:7")
    assert "generated:7: generated" in text
    assert "phase" in text
    assert "what a model reads at 300 s" in text


def test_lists_name_everything_that_ships():
    assert "resco:<map>" in shown(list_scenarios)
    assert "tiny-cpu" in shown(list_recipes)
