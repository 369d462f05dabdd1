"""What the `fixed` controller measures is what SUMO alone gives, trip for trip."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import sumo

from envs.scenario import load_scenario
from envs.types import NUM_RNGS
from envs.world import World


@pytest.mark.parametrize("name", ["generated:7", "resco:ingolstadt1"])
def test_the_fixed_program_costs_what_plain_sumo_says(name, tmp_path):
    scenario = load_scenario(name)
    with World() as world:
        world.reset(scenario, seed=3, program="fixed")
        world.drive("fixed", until_s=scenario.end_s)
        ours = world.trips()
    trips_file = tmp_path / "trips.xml"
    command = [
        os.path.join(sumo.SUMO_HOME, "bin", "sumo"),
        *("--net-file", scenario.net_file, "--route-files", ",".join(scenario.route_files)),
        *("--begin", str(scenario.begin_s), "--end", str(scenario.end_s), "--seed", "3"),
        *("--thread-rngs", str(NUM_RNGS)),
        *("--step-length", str(scenario.step_length_s), "--time-to-teleport", "-1"),
        *("--tripinfo-output", str(trips_file), "--tripinfo-output.write-unfinished", "true"),
        *("--no-step-log", "true", "--no-warnings", "true"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    trips = list(ElementTree.parse(trips_file).getroot().iter("tripinfo"))
    lost_s = [float(trip.get("timeLoss")) + float(trip.get("departDelay")) for trip in trips]
    num_arrived = sum(float(trip.get("arrival")) >= 0 for trip in trips)
    assert (ours.throughput_veh, ours.unfinished_veh) == (num_arrived, len(trips) - num_arrived)
    # Vehicles that never departed are not in SUMO's file; each has waited for part of the window.
    of_others_s = ours.delay_s * ours.num_trips - sum(lost_s)
    window_s = scenario.end_s - scenario.begin_s
    assert -0.01 <= of_others_s <= ours.not_departed_veh * window_s + 0.01
    assert ours.not_departed_veh <= 0.01 * ours.num_trips
