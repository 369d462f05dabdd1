"""How far apart the phases of a junction cost, and how much of that is chance.

SUMO's lanes share 64 generators of random numbers, so another phase at one junction changes how
vehicles everywhere dawdle. Ours have a generator each (up to `envs.types.NUM_RNGS`). Every instant
tries all legal phases of a junction, and the table has the standard deviation of what they cost the
whole network, in the median; chance is the part of its square that is gone with a generator per
lane. The two ways meet other instants, because their traffic differs: few of them say little.

    python scripts/bench/chance.py [--scenario resco:cologne8] [--num 100]
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import replace

from rich.console import Console
from rich.progress import track
from rich.table import Table

from envs.errors import UserError
from envs.scenario import load_scenario
from envs.types import Action, Scenario
from envs.world import World

MAPS = ("resco:cologne1", "generated:258%140@5", "resco:cologne8", "resco:arterial4x4")
SHARED = ("thread-rngs", "64")
"""SUMO's own number of generators."""
WARM_UP_S = 600
EVERY_S = 60
HORIZON_S = 60.0
FOLLOW = "max_wave"


def spreads_veh_s(scenario: Scenario, num: int) -> list[float]:
    """Standard deviation over the phases of a junction, at `num` instants that have a choice.

    Raises:
        UserError: an episode has none.
    """
    rng = random.Random(scenario.name)
    found: list[float] = []
    seed = 0
    with World(timeout_s=600) as world:
        while len(found) < num:
            seed += 1
            before = len(found)
            world.reset(scenario, seed)
            for time_s in range(WARM_UP_S, int(scenario.end_s - scenario.begin_s), EVERY_S):
                world.drive(FOLLOW, scenario.begin_s + time_s)
                free = [d for d in world.decisions() if len(d.legal) > 1]
                if free and len(found) < num:
                    decision = rng.choice(free)
                    tls_id = decision.junction.tls_id
                    tries = [{tls_id: Action(phase=phase)} for phase in decision.legal]
                    outcomes = world.branch(tries, HORIZON_S, FOLLOW)
                    found.append(statistics.pstdev(o.time_loss_veh_s for o in outcomes))
            if len(found) == before:
                raise UserError(f"{scenario.name} has no choice after {WARM_UP_S} s")
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", action="append", help="may be given again")
    parser.add_argument("--num", type=int, default=100, help="instants of each scenario")
    arguments = parser.parse_args()
    if arguments.num < 1:
        parser.error(f"--num {arguments.num}: expected 1 or more")
    table = Table(title=f"between the phases of a junction, {HORIZON_S:g} s, veh s (medians)")
    table.add_column("scenario")
    for column in ("64 generators", "one per lane", "chance"):
        table.add_column(column, justify="right")
    for name in track(arguments.scenario or MAPS, "scenarios", transient=True):
        own = load_scenario(name)
        shared = replace(own, options=(*own.options, SHARED))
        shared_veh_s, own_veh_s = (
            statistics.median(spreads_veh_s(scenario, arguments.num)) for scenario in (shared, own)
        )
        table.add_row(
            name,
            f"{shared_veh_s:.1f}",
            f"{own_veh_s:.1f}",
            f"{max(0.0, 1 - (own_veh_s / shared_veh_s) ** 2):.0%}",
        )
    Console(width=96).print(table)


if __name__ == "__main__":
    main()
