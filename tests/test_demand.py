"""How many vehicles a scenario's files let depart."""

from __future__ import annotations

import gzip
from dataclasses import replace

import pytest

from envs.demand import num_departures
from envs.types import Scenario


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


def test_a_scaled_scenario_has_so_many_times_as_many(tmp_path):
    file = tmp_path / "mine.rou.xml"
    file.write_text('<routes><vehicle id="a" depart="1"/></routes>')
    assert num_departures(replace(scenario(file), options=(("scale", "1.5"),))) == 1.5
