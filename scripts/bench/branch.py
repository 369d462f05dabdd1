"""What trying one phase costs: a fork of the running simulation beside the usual way to do it.

The usual way is a new SUMO process per candidate that loads a saved state and is driven by TraCI.
Every round tries one candidate at one instant all ways, then both running simulations execute it,
so every row did the same simulated seconds from the same traffic. Controller and measurement are
one code, `envs.sumo`, over libsumo or over TraCI. In favour of the usual way, writing the state is
not counted, and what is known of the network is not read again.

    python scripts/bench/branch.py [--scenario resco:ingolstadt21] [--num 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

# First: envs.sumo over TraCI here, while the world processes keep libsumo.
from saved_state import TraciSimulation

from envs.scenario import load_scenario
from envs.types import Action, Decision, JointAction, Outcome, Scenario
from envs.world import World

SEED = 1
WARM_UP_S = 600
HORIZON_S = 60.0
FOLLOW = "max_wave"
LIVE, FORK, TRACI_LIVE, RELOAD = "play", "fork", "traci", "reload"
ROWS = {
    LIVE: "running simulation, nothing tried",
    FORK: "World.branch: a fork",
    TRACI_LIVE: "running simulation over TraCI",
    RELOAD: "new SUMO, saved state, TraCI",
}


def measure(
    scenario: Scenario, num: int
) -> tuple[dict[str, list[float]], dict[str, int], list[float]]:
    """Seconds of every round by row, how many matched, and seconds to start a loaded process."""
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    matched = dict.fromkeys((FORK, RELOAD), 0)
    starts: list[float] = []
    with World(timeout_s=600) as world, tempfile.TemporaryDirectory() as folder:
        over_traci = TraciSimulation(scenario, SEED)
        try:
            world.reset(scenario, SEED)
            world.drive(FOLLOW, scenario.begin_s + WARM_UP_S)
            over_traci.drive(FOLLOW, scenario.begin_s + WARM_UP_S)

            def reload(action: JointAction) -> Outcome:
                start = time.perf_counter()
                with saved.opened() as twin:
                    starts.append(time.perf_counter() - start)
                    return twin.play(action, HORIZON_S, FOLLOW)

            ways: dict[str, Callable[[JointAction], Outcome]] = {
                FORK: lambda action: world.branch([action], HORIZON_S, FOLLOW)[0],
                LIVE: lambda action: world.play(action, HORIZON_S, FOLLOW),
                RELOAD: reload,
                TRACI_LIVE: lambda action: over_traci.play(action, HORIZON_S, FOLLOW),
            }
            # The first round warms up and is not counted.
            for number in range(num + 1):
                action = _candidate(world.decisions(), number)
                over_traci.decisions()
                saved = over_traci.save(Path(folder) / "state.xml")
                found = {}
                for row in _order(number):
                    start = time.perf_counter()
                    found[row] = ways[row](action)
                    seconds[row].append(time.perf_counter() - start)
                if found[LIVE] != found[TRACI_LIVE]:
                    raise SystemExit("the two running simulations differ: nothing can be compared")
                for row in matched:
                    matched[row] += number > 0 and found[row].digest == found[LIVE].digest
        finally:
            over_traci.close()
    return {row: times[1:] for row, times in seconds.items()}, matched, starts[1:]


def over_all_cores(scenario: Scenario, num: int) -> tuple[Counter[str], Counter[str]]:
    """Seconds and core-seconds to simulate the same on all cores at once: in branches, and in
    worlds that nobody ever forks. Each core has a world of either kind, in turns."""
    num_cores = os.cpu_count() or 1
    wall_s, core_s = Counter[str](), Counter[str]()
    with ExitStack() as stack, ThreadPoolExecutor(num_cores) as executor:
        forked, pure = (
            [stack.enter_context(World(timeout_s=600)) for _ in range(num_cores)] for _ in range(2)
        )

        def on_all(call: Callable[..., object], *arguments: Iterable[object]) -> None:
            list(executor.map(call, *arguments))

        def prepare(world: World, seed: int) -> None:
            world.reset(scenario, seed)
            world.drive(FOLLOW, scenario.begin_s + WARM_UP_S)

        def branch(world: World, action: JointAction) -> None:
            world.branch([action], HORIZON_S, FOLLOW)

        def play(world: World, action: JointAction) -> None:
            world.play(action, HORIZON_S, FOLLOW)

        on_all(prepare, [*forked, *pure], 2 * list(range(1, num_cores + 1)))
        # The first round warms up and is not counted.
        for number in range(num + 1):
            actions = [_candidate(world.decisions(), number) for world in forked]
            on_all(World.decisions, pure)
            ways = [(FORK, branch, forked), (LIVE, play, pure)]
            for row, way, worlds in ways[:: 1 if number % 2 else -1]:
                start, used = time.perf_counter(), _core_s(worlds)
                on_all(way, worlds, actions)
                if number:
                    wall_s[row] += time.perf_counter() - start
                    core_s[row] += _core_s(worlds) - used
            on_all(play, forked, actions)
    return wall_s, core_s


def _core_s(worlds: Sequence[World]) -> float:
    """What the worlds and their forks have used so far."""
    return sum(sum(psutil.Process(world.pid).cpu_times()[:4]) for world in worlds)


def _candidate(decisions: Sequence[Decision], number: int) -> JointAction:
    decision = decisions[number % len(decisions)]
    phase = decision.legal[number % len(decision.legal)]
    return {decision.junction.tls_id: Action(phase=phase)}


def _order(number: int) -> list[str]:
    """Alternating, and each trial before the execution of what it tries."""
    ours, usual = [FORK, LIVE], [RELOAD, TRACI_LIVE]
    return ours + usual if number % 2 else usual + ours


def _print(
    title: str, seconds: dict[str, list[float]], matched: dict[str, int], starts: list[float]
) -> None:
    def paired(row: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[row], seconds[other], strict=True))

    table = Table(title=title, caption="medians; ratios within a round")
    table.add_column("")
    for column in ("s each", "per s", "times play", "times fork", "pure simulation", "exact"):
        table.add_column(column, justify="right")
    alone = {FORK: LIVE, RELOAD: TRACI_LIVE}
    for row, name in ROWS.items():
        median = statistics.median(seconds[row])
        table.add_row(
            name,
            f"{median:.4f}",
            f"{1 / median:.1f}",
            f"{paired(row, LIVE):.2f}",
            f"{paired(row, FORK):.2f}",
            f"{paired(alone[row], row):.0%}" if row in alone else "",
            f"{matched[row]} of {len(seconds[row])}" if row in alone else "",
        )
    table.add_row("  of it: start, load, connect", f"{statistics.median(starts):.4f}")
    Console(width=112).print(table)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="resco:cologne1")
    parser.add_argument("--num", type=int, default=20, help="candidates tried each way")
    arguments = parser.parse_args()
    scenario = load_scenario(arguments.scenario)
    room = int((scenario.end_s - scenario.begin_s - WARM_UP_S) / HORIZON_S) - 1
    if not 1 <= arguments.num <= room:
        parser.error(f"--num {arguments.num}: expected 1 to {room} for {scenario.name}")
    found = measure(scenario, arguments.num)
    _print(f"{scenario.name}: {arguments.num} candidates, {HORIZON_S:g} s each", *found)
    wall_s, core_s = over_all_cores(scenario, arguments.num)
    simulated_s = (os.cpu_count() or 1) * arguments.num * HORIZON_S
    print(
        f"all cores at once: {simulated_s / wall_s[FORK]:.0f} simulated seconds per second in "
        f"branches, {simulated_s / wall_s[LIVE]:.0f} in worlds that are never forked: "
        f"{wall_s[LIVE] / wall_s[FORK]:.0%} of pure simulation "
        f"({core_s[LIVE] / core_s[FORK]:.0%} by core-seconds)"
    )


if __name__ == "__main__":
    main()
