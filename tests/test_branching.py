"""The contract of branching, on every kind of scenario: what is tried is what then happens.

A branch of the action that is executed equals the continued simulation, vehicle for vehicle, and
the live world never notices that it was branched.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import UserError, WorldError
from envs.fork import fork_map
from envs.scenario import load_scenario
from envs.types import Action, Decision, Scenario
from envs.world import World

HORIZON_S = 60.0
KINDS = {
    "generated:1": 300,
    "generated:6": 300,
    "generated:6%140@5": 300,
    "grid:2": 200,
    "resco:cologne1": 240,
    "resco:ingolstadt7": 120,
    "user": 200,
}
"""Scenario of each kind, and how long its traffic builds up."""


@pytest.fixture(scope="module")
def world():
    with World() as world:
        yield world


def users_own(folder: Path) -> Scenario:
    """A `.sumocfg` as a user has it, beside copies of somebody's network and demand."""
    origin = load_scenario("generated:2")
    shutil.copy(origin.net_file, folder / "town.net.xml")
    shutil.copy(origin.route_files[0], folder / "town.rou.xml")
    (folder / "town.sumocfg").write_text(
        "<configuration><input><net-file value='town.net.xml'/>"
        "<route-files value='town.rou.xml'/></input>"
        "<time><begin value='0'/><end value='3600'/><step-length value='0.5'/></time>"
        "</configuration>"
    )
    return load_scenario(str(folder / "town.sumocfg"))


@pytest.fixture(params=KINDS)
def started(request, world, tmp_path) -> tuple[World, Scenario]:
    """The world with traffic in it."""
    name = request.param
    scenario = users_own(tmp_path) if name == "user" else load_scenario(name)
    start(world, scenario, KINDS[name])
    return world, scenario


def start(world: World, scenario: Scenario, warm_up_s: float) -> None:
    world.reset(scenario, seed=7)
    world.drive("max_pressure", scenario.begin_s + warm_up_s)


def candidates(decision: Decision) -> list[dict[str, Action]]:
    return [{decision.junction.tls_id: Action(phase=phase)} for phase in decision.legal]


def last_legal(decisions: tuple[Decision, ...]) -> dict[str, Action]:
    return {d.junction.tls_id: Action(phase=d.legal[-1]) for d in decisions}


def busiest(decisions: tuple[Decision, ...]) -> Decision:
    """The decision with most legal phases, then most queued vehicles."""
    return max(
        decisions, key=lambda d: (len(d.legal), sum(s.queue_veh for s in d.observation.lanes))
    )


def test_the_branch_of_the_executed_action_is_what_then_happens(started):
    world, _ = started
    for instant in range(2):
        tries = candidates(busiest(world.decisions()))
        follow = ("max_wave", "max_pressure")[instant]
        outcomes = world.branch(tries, HORIZON_S, follow, parallel=2)
        executed = instant % len(tries)
        assert world.play(tries[executed], HORIZON_S, follow) == outcomes[executed]


def test_one_interval_of_the_executed_action_equals_its_branch(started):
    world, _ = started
    for instant in range(2):
        joint = last_legal(world.decisions())
        tries = [joint, *candidates(busiest(world.decisions()))]
        outcomes = world.branch(tries, 20.0, "max_wave", parallel=1 + instant % 2)
        assert world.step(joint) == outcomes[0].interval_digest


@pytest.mark.parametrize("interval_s", [4, 6, 12])
def test_what_is_measured_is_the_same_however_often_junctions_choose(world, interval_s):
    measured = []
    for name in ("generated:3", f"generated:3@{interval_s}"):
        scenario = load_scenario(name)
        world.reset(scenario, seed=7)
        # Nobody chooses anything, so the traffic is the same.
        world.drive("fixed", scenario.begin_s + 120)
        measured.append(world.play({}, HORIZON_S, "fixed"))
    often = replace(measured[1], interval_digest=measured[0].interval_digest)
    assert often == measured[0]
    assert often.time_loss_veh_s > 0
    assert often.halting_veh_s > 0


def test_branching_leaves_the_live_world_untouched(started):
    world, scenario = started
    begin_s, _ = world.time()
    histories = []
    for parallel in (None, 1, 2):
        start(world, scenario, begin_s - scenario.begin_s)
        history: list[object] = []
        for _ in range(3):
            decisions = world.decisions()
            if parallel:
                world.branch(candidates(busiest(decisions)), 20.0, parallel=parallel)
            assert world.decisions() == decisions
            history.append(world.step(last_legal(decisions)))
        histories.append([*history, world.trips()])
    assert histories[0] == histories[1] == histories[2]


def test_different_phases_make_different_worlds(world):
    start(world, load_scenario("resco:cologne1"), 300)
    tries = candidates(world.decisions()[0])
    outcomes = world.branch(tries, HORIZON_S)
    assert len(tries) > 1
    assert len({o.digest for o in outcomes}) == len({o.time_loss_veh_s for o in outcomes}) > 1
    assert all(o.horizon_s == HORIZON_S and o.time_loss_veh_s > 0 for o in outcomes)


def test_identical_candidates_are_simulated_once(world):
    start(world, load_scenario("generated:1"), 300)
    first, *_ = candidates(world.decisions()[0])
    assert len({id(o) for o in world.branch([first] * 40, HORIZON_S)}) == 1


def test_half_second_steps_lose_the_same_kind_of_time(world, tmp_path):
    scenario = users_own(tmp_path)
    assert scenario.step_length_s == 0.5
    start(world, scenario, 100)
    half = world.play({}, 900, "max_wave")
    start(world, load_scenario("generated:2"), 100)
    whole = world.play({}, 900, "max_wave")
    assert half.horizon_s == whole.horizon_s == 900
    assert 0.6 < half.time_loss_veh_s / whole.time_loss_veh_s < 1.7


def test_an_illegal_candidate_is_the_callers_mistake_and_changes_nothing(world):
    start(world, load_scenario("generated:1"), 100)
    (decision,) = world.decisions()
    tls_id = decision.junction.tls_id
    for wrong in ({tls_id: Action(phase=99)}, {"nowhere": Action(phase=0)}):
        for attempt in (
            lambda w=wrong: world.branch([w], HORIZON_S),
            lambda w=wrong: world.play(w, HORIZON_S, "max_wave"),
            lambda w=wrong: world.step(w),
        ):
            with pytest.raises(UserError, match="cannot be chosen"):
                attempt()
    assert world.decisions() == (decision,)


# Forks by themselves


def test_a_process_with_two_threads_is_never_forked():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(WorldError) as caught:
            fork_map(lambda item: item, [1])
    finally:
        done.set()
        thread.join()
    assert caught.value.cause == "threads"


def test_a_branch_that_fails_is_named_with_its_reason(world):
    start(world, load_scenario("generated:1"), 100)
    tries = candidates(world.decisions()[0])
    with pytest.raises(WorldError) as caught:
        world.branch(tries, HORIZON_S, "nobody")
    assert caught.value.cause == "branch_failed"
    assert "nobody" in caught.value.detail


def test_a_branch_that_dies_is_named_and_the_world_lives_on(world):
    start(world, load_scenario("resco:cologne1"), 200)
    before = world.decisions()
    tries = candidates(before[0])
    killer = threading.Thread(target=kill_first_child, args=(world.pid,))
    killer.start()
    with pytest.raises(WorldError) as caught:
        world.branch(tries, 3000.0)
    killer.join()
    assert caught.value.cause == "branch_died"
    assert children(world.pid) == []
    assert world.decisions() == before
    outcomes = world.branch(tries, HORIZON_S)
    assert world.play(tries[0], HORIZON_S, "max_wave") == outcomes[0]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_first_child(pid: int) -> None:
    import os
    import signal

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := children(pid):
            os.kill(found[0], signal.SIGKILL)
            return
        time.sleep(0.002)
