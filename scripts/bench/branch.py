"""What trying one phase costs: a fork of the running simulation beside the usual way to do it.

The usual way is a new SUMO process per candidate that loads a saved state and is driven by TraCI.
Every round tries one candidate at one instant all ways, then both running simulations execute it,
so every row did the same simulated seconds from the same traffic. Controller and measurement are
one code, `envs.sumo`, over libsumo or over TraCI. In favour of the usual way, writing the state is
not counted, what is known of the network is not read again, and a new process is asked every 2 ms
whether it listens (`traci.start` itself waits a whole second after its first attempt).

    python scripts/bench/branch.py [--scenario resco:ingolstadt21] [--num 20]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# With it set, `import traci` gives libsumo.
os.environ.pop("LIBSUMO_AS_TRACI", None)

import sumo  # noqa: F401 - tells the SUMO processes where their data is
import traci
from rich.console import Console
from rich.table import Table

from envs.generator import sumo_tool
from envs.scenario import load_scenario
from envs.types import JointAction, Outcome, Scenario
from envs.world import World

# envs.sumo speaks to whatever is called libsumo: here that is TraCI, and the world processes keep
# the real one.
sys.modules["libsumo"] = traci
from envs.sumo import Simulation  # noqa: E402

SEED = 1
WARM_UP_S = 600
HORIZON_S = 60.0
FOLLOW = "max_wave"
POLL_S = 0.002
LIVE, FORK, TRACI_LIVE, RELOAD = "play", "fork", "traci", "reload"
ROWS = {
    LIVE: "running simulation, nothing tried",
    FORK: "World.branch: a fork",
    TRACI_LIVE: "running simulation over TraCI",
    RELOAD: "new SUMO, saved state, TraCI",
}


class TraciSimulation(Simulation):
    """The simulation of `envs.sumo` in a SUMO process of its own, reached by TraCI."""

    def _options(self, *arguments: Any) -> list[str]:
        extra = {
            "--save-state.rng": "true",
            "--save-state.precision": "12",
            "--xml-validation": "never",
            "--xml-validation.net": "never",
        }
        options = super()._options(*arguments)[1:]
        return [sumo_tool("sumo"), *options, *(text for pair in extra.items() for text in pair)]

    def save(self, file: Path) -> None:
        """Write the state of SUMO; what the signals show is not in it."""
        traci.simulation.saveState(str(file))

    @contextlib.contextmanager
    def reloaded(self, file: Path) -> Iterator[TraciSimulation]:
        """A new SUMO process that goes on from the file; the running one waits meanwhile."""
        options = self._options()
        named = dict(zip(options[1::2], options[2::2], strict=True))
        named |= {"--load-state": str(file), "--begin": str(self.time_s)}
        for trips in ("--tripinfo-output", "--tripinfo-output.write-unfinished"):
            del named[trips]
        port = traci.main.getFreeSocketPort()
        named["--remote-port"] = str(port)
        running = traci.getLabel()
        process = subprocess.Popen(
            [options[0], *(text for pair in named.items() for text in pair)],
            stdout=subprocess.DEVNULL,
        )
        with _silence():
            traci.connect(
                port, numRetries=10_000, proc=process, waitBetweenRetries=POLL_S, label="candidate"
            )
        traci.switch("candidate")
        try:
            twin = copy.copy(self)
            for name in ("_current", "_green_since", "_seen"):
                setattr(twin, name, dict(getattr(self, name)))
            for spec in twin.junctions:
                twin._show(spec, twin._state(spec))
            yield twin
        finally:
            traci.close()
            traci.switch(running)


def measure(
    scenario: Scenario, num: int
) -> tuple[dict[str, list[float]], dict[str, int], list[float]]:
    """Seconds of every round by row, how many matched, and seconds to start a loaded process."""
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    matched = dict.fromkeys((FORK, RELOAD), 0)
    starts: list[float] = []
    with World(timeout_s=600) as world, tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.xml"
        with _silence():
            over_traci = TraciSimulation(scenario, SEED)
        try:
            world.reset(scenario, SEED)
            world.drive(FOLLOW, scenario.begin_s + WARM_UP_S)
            over_traci.drive(FOLLOW, scenario.begin_s + WARM_UP_S)

            def reload(action: JointAction) -> Outcome:
                start = time.perf_counter()
                with over_traci.reloaded(state) as twin:
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
                decisions = world.decisions()
                decision = decisions[number % len(decisions)]
                phase = decision.legal[number % len(decision.legal)]
                over_traci.decisions()
                over_traci.save(state)
                found = {}
                for row in _order(number):
                    start = time.perf_counter()
                    found[row] = ways[row]({decision.junction.tls_id: phase})
                    seconds[row].append(time.perf_counter() - start)
                if found[LIVE] != found[TRACI_LIVE]:
                    raise SystemExit("the two running simulations differ: nothing can be compared")
                for row in matched:
                    matched[row] += number > 0 and found[row].digest == found[LIVE].digest
        finally:
            over_traci.close()
    return {row: times[1:] for row, times in seconds.items()}, matched, starts[1:]


def _order(number: int) -> list[str]:
    """Alternating, and each trial before the execution of what it tries."""
    ours, usual = [FORK, LIVE], [RELOAD, TRACI_LIVE]
    return ours + usual if number % 2 else usual + ours


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """TraCI prints every attempt to connect."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield


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


if __name__ == "__main__":
    main()
