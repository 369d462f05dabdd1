"""World: the process lives and dies as promised, and every way to fail has its own name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import UserError, WorldError
from envs.fork import num_threads
from envs.scenario import load_scenario
from envs.types import Action
from envs.world import World

SCENARIO = "generated:1"


@pytest.fixture(scope="module")
def world():
    """One that no test kills."""
    with World() as world:
        yield world


@pytest.fixture
def started(world):
    world.reset(load_scenario(SCENARIO), seed=1)
    return world


@pytest.fixture
def mortal():
    """One to kill."""
    with World() as world:
        world.reset(load_scenario(SCENARIO), seed=1)
        yield world


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_world_has_one_thread_and_imports_no_heavy_library(started):
    assert num_threads(started.pid) == 1
    loaded = Path(f"/proc/{started.pid}/maps").read_text()
    assert "libsumo" in loaded
    assert not [name for name in ("libtorch", "_raylet", "/pyarrow/") if name in loaded]


def test_same_seed_same_world_other_seed_other_world(started):
    digests = []
    for seed in (3, 3, 4):
        started.reset(load_scenario(SCENARIO), seed=seed)
        started.drive("random", 200)
        digests.append(started.step({}))
    assert digests[0] == digests[1] != digests[2]


def test_time_tells_when_the_window_is_over(started):
    assert started.time() == (0.0, False)
    started.reset(replace(load_scenario(SCENARIO), end_s=20.0), seed=1)
    started.drive("max_wave", 20)
    assert started.time() == (20.0, True)


def test_vehicles_that_wait_within_the_junction_belong_to_the_phases_of_their_way(world):
    world.reset(load_scenario("resco:cologne1"), seed=1)
    seen = set()
    for _ in range(120):
        world.drive("max_wave", world.time()[0] + 5)
        [decision] = world.decisions()
        seen.add(decision.observation.inside_veh)
        ways = [set(phase.inside) for phase in decision.junction.phases]
        assert all(lane.startswith(":") for way in ways for lane in way)
    through, left, *_ = ways
    assert left < through  # its lefts give way within the through phase
    assert max(max(inside) for inside in seen) > 0
    assert all(inside[0] >= inside[1] for inside in seen)


def test_a_road_that_joins_beside_a_lane_is_upstream_of_that_lane_too(world):
    [junction] = world.reset(load_scenario("resco:ingolstadt1"), seed=1)
    right, left = (
        next(lane for lane in junction.lanes if lane.approach == "west" and lane.turns == (turn,))
        for turn in ("right", "left")
    )
    # A side street leads into the lane to the right, nine metres before the stop line.
    assert right.upstream
    assert left.upstream == right.upstream


def test_vehicles_behind_a_turn_off_are_seen_as_upstream(world):
    [junction] = world.reset(load_scenario("resco:ingolstadt1"), seed=1)
    assert all(lane.length_m < 150 for lane in junction.lanes)
    assert any(phase.upstream for phase in junction.phases)
    for phase in junction.phases:
        own = {lane for i in phase.lanes for lane, _ in junction.lanes[i].chain}
        assert all(lane not in own and 0 < end < 200 for lane, end in phase.upstream)
    seen = []
    for _ in range(60):
        world.drive("max_wave", world.time()[0] + 10)
        [decision] = world.decisions()
        seen.append(decision.observation)
    for i, phase in enumerate(junction.phases):
        assert any(sum(o.upstream_veh[i]) for o in seen) == bool(phase.upstream)
    assert any(halting for o in seen for halting, _ in o.upstream_veh)
    # What is behind a phase is behind one of its lanes.
    for o in seen:
        for phase, counts in zip(junction.phases, o.upstream_veh, strict=True):
            behind = [o.lanes[i].upstream_veh for i in phase.lanes]
            assert all(sum(c) >= n for c, n in zip(zip(*behind, strict=True), counts, strict=True))


def test_vehicles_that_drive_through_a_short_road_do_not_fill_it(world):
    world.reset(load_scenario("resco:ingolstadt1"), seed=1)  # nine metres behind the junction
    for _ in range(60):
        world.drive("max_wave", world.time()[0] + 10)
        [decision] = world.decisions()
        seen = decision.observation
        assert all(
            standing or free == 1.0
            for free, standing in zip(seen.downstream_free, seen.downstream_queue_veh, strict=True)
        )


def test_trips_count_every_vehicle_of_the_window(started):
    started.drive("max_wave", 300)
    trips = started.trips()
    finished, open_ = trips.throughput_veh, trips.unfinished_veh + trips.not_departed_veh
    assert trips.num_trips == finished + open_ > 20
    assert trips.queue_veh > 0


def test_queues_are_counted_under_the_programs_of_the_network_too(world):
    scenario = load_scenario("generated:3")
    world.reset(scenario, seed=1, program="fixed")
    world.drive("fixed", scenario.begin_s + 300)
    assert world.trips().queue_veh > 0


def test_a_killed_world_died(mortal):
    os.kill(mortal.pid, signal.SIGKILL)
    with pytest.raises(WorldError) as caught:
        mortal.decisions()
    assert caught.value.cause == "died"
    assert "-9" in caught.value.detail
    assert wait_until_gone(mortal.pid)


def test_a_world_that_has_ended_says_so(mortal):
    mortal.close()
    mortal.close()
    with pytest.raises(WorldError) as caught:
        mortal.decisions()
    assert caught.value.cause == "closed"


def test_a_hung_simulator_is_a_timeout_and_gone(mortal):
    mortal.timeout_s = 0.3
    os.kill(mortal.pid, signal.SIGSTOP)
    with pytest.raises(WorldError) as caught:
        mortal.decisions()
    assert caught.value.cause == "timeout"
    assert wait_until_gone(mortal.pid)


def test_a_world_that_is_asked_before_it_starts_is_an_error():
    with World() as world, pytest.raises(WorldError) as caught:
        world.decisions()
    assert caught.value.cause == "simulator"


@pytest.mark.parametrize("ending", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_world_ends_with_its_parent(ending):
    program = (
        "import os, signal, sys\n"
        "from envs.scenario import load_scenario\n"
        "from envs.world import World\n"
        "world = World()\n"
        f"world.reset(load_scenario({SCENARIO!r}), 1)\n"
        "print(world.pid, flush=True)\n"
        f"{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert wait_until_gone(int(done.stdout))


def test_a_world_runs_the_code_of_its_caller_wherever_that_stands(tmp_path, monkeypatch):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("raise SystemExit('the wrong envs')")
    monkeypatch.chdir(tmp_path)
    with World() as world:
        assert world.reset(load_scenario(SCENARIO), seed=1)


@pytest.mark.parametrize("end", [World.close, lambda world: os.kill(world.pid, signal.SIGKILL)])
def test_a_world_leaves_no_files(tmp_path, monkeypatch, end):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with World() as world:
        world.reset(load_scenario(SCENARIO), seed=1)
        world.drive("max_wave", 60)
        assert list(tmp_path.rglob("trips.xml"))
        end(world)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_world_kills_what_it_is_busy_with(mortal, monkeypatch):
    monkeypatch.setattr("envs.world.EXIT_S", 0.2)
    mortal.timeout_s = 0.5
    scenario = load_scenario("resco:ingolstadt7")
    mortal.reset(scenario, seed=1)
    with pytest.raises(WorldError, match="took longer"):
        mortal.drive("lookahead", scenario.end_s)
    assert wait_until_gone(mortal.pid)


# What users hand us


def complaint(world: World, scenario, **options) -> str:
    with pytest.raises(UserError) as caught:
        world.reset(scenario, 1, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_broken_net_is_one_sentence_and_the_world_lives_on(world, tmp_path):
    broken = tmp_path / "broken.net.xml"
    scenario = load_scenario(SCENARIO)
    text = Path(scenario.net_file).read_text()
    broken.write_text(text[: len(text) // 2])
    assert "broken.net.xml" in complaint(world, replace(scenario, net_file=str(broken)))
    missing = replace(scenario, net_file=str(tmp_path / "none.net.xml"))
    assert "none.net.xml" in complaint(world, missing)
    world.reset(scenario, seed=1)
    assert world.decisions()


def test_routes_of_another_net_are_one_sentence(world):
    one, other = load_scenario(SCENARIO), load_scenario("resco:cologne1")
    assert "SUMO cannot load" in complaint(world, replace(one, route_files=other.route_files))


def test_a_net_without_a_choice_of_phases_is_one_sentence(world, tmp_path):
    scenario = load_scenario(SCENARIO)
    text = Path(scenario.net_file).read_text()
    start, end = text.index("<tlLogic"), text.index("</tlLogic>")
    only = text[start:end].splitlines()[:2]
    net = tmp_path / "single.net.xml"
    net.write_text(text[:start] + "\n".join(only) + text[end:])
    assert "two green phases" in complaint(world, replace(scenario, net_file=str(net)))


def test_a_step_length_that_misses_whole_seconds_is_one_sentence(world):
    scenario = load_scenario(SCENARIO)
    for length in (0.4, 2.0, 0.0):
        assert "step-length" in complaint(world, replace(scenario, step_length_s=length))


def test_an_illegal_action_is_the_callers_mistake(started):
    (decision,) = started.decisions()
    with pytest.raises(UserError, match="phase 99 of junction"):
        started.step({decision.junction.tls_id: Action(phase=99)})
    assert started.decisions() == (decision,)
