"""Draw a signalised junction, two in a row or a grid of them as numbers: roads, lanes, demand.

The same seed gives the same city. Structure follows what mapped cities show: lefts that give way
and lefts with their own phase, side roads, vehicles that look for their lane late; the junctions
themselves are drawn in `envs.crossing`. Nothing here knows SUMO or files; `envs.generator` writes
and builds what is drawn here.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from envs.crossing import Crossing, Link, draw_crossing, draw_lanes

Route = tuple[tuple[int, int], ...]
"""(crossing, arm) by which each crossing on the way is left."""

ARTERIAL_EVERY = 6
"""Seeds divisible by this give two junctions in a row, all others one."""

SIDE_ROAD_SHARE = 0.8
SIDE_ROAD_BELOW_M = 150.0
"""Of approaches whose first piece is shorter than this, so many have a side road behind it."""

GRID_SHAPES = ((1, 3), (1, 4), (2, 2), (2, 3), (3, 3))
"""Rows and columns."""
BLOCK_M = (140.0, 320.0)
"""Between parallel streets."""
MAX_TURNS = 2
"""Of a vehicle on its way."""

OWN_GREENS_EVERY = 10
"""Seeds divisible by this give approaches a green of their own, where junctions are simple."""
GRID_OWN_GREENS_SHARE = 0.6
"""Of grids, so many do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class City:
    """Everything that makes one generated scenario."""

    seed: int
    crossings: tuple[Crossing, ...]
    layout: str
    """opposites: facing approaches share a phase; incoming: every approach has its own."""
    left_green_s: int
    """Length of phases for left turns only; 0 for none."""
    permissive_left_mps: float
    """Lefts may give way inside the through phase where oncoming traffic is no faster."""
    yellow_s: int
    truck_share: float
    late_lanes: bool
    """Vehicles enter on the kerb lane, SUMO's default, and look for theirs on the way: where the
    approach is short they do so in front of the signal and block the lane for those behind.
    Otherwise they enter at full speed on the lane that suits their turn."""
    load: float
    """Share of a lane's saturation flow that the busiest lanes of all greens carry together."""
    own_greens: str
    """none, main or all: the arms whose approach has a green of its own beside the shared ones."""

    def leads_to(self, crossing: int, arm: int) -> tuple[int, int] | None:
        """(crossing, arm) at which one arrives by leaving through an arm; None: out of the city."""
        return self.crossings[crossing].arms[arm].leads_to

    def exit_edge(self, crossing: int, arm: int) -> str:
        """Id of the edge by which one leaves a crossing through an arm."""
        there = self.leads_to(crossing, arm)
        return f"in{there[0]}_{there[1]}_0" if there else f"out{crossing}_{arm}_0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Vehicles that enter by one arm and leave by another, as (crossing, arm) pairs."""

    entry: tuple[int, int]
    path: Route
    """Empty: by a side road before the first crossing."""
    side: int = 0
    """Which side road."""
    rate_vph: float
    profile: tuple[float, ...]


def draw_city(seed: int) -> City:
    """The city of a seed: always the same, never the same as another's."""
    rng = random.Random(seed)
    if seed % ARTERIAL_EVERY == 0:
        crossings = _draw_arterial(rng)
    else:
        turnarounds = rng.random() < 0.45
        bearings = _draw_bearings(rng)
        lanes = draw_lanes(rng, len(bearings))
        crossings = (draw_crossing(rng, 0.0, 0.0, bearings, lanes, turnarounds=turnarounds),)
    city = _furnished(rng, seed, crossings)
    simple = city.layout == "opposites" and max(len(c.arms) for c in crossings) <= 4
    return _with_own_greens(rng, city) if simple and seed % OWN_GREENS_EVERY == 0 else city


def draw_grid(seed: int) -> City:
    """A row or a grid of junctions, wide streets from west to east, whose traffic turns at most
    twice."""
    rng = random.Random(f"grid/{seed}")
    rows, columns = rng.choice(GRID_SHAPES)
    xs_m = _places(rng, columns)
    ys_m = _places(rng, rows)
    lanes_x = [rng.choice((2, 2, 3)) for _ in range(rows)]
    lanes_y = [rng.choice((1, 1, 2)) for _ in range(columns)]
    turnarounds = rng.random() < 0.2
    crossings = []
    for c in range(rows * columns):
        row, column = divmod(c, columns)
        links = {
            arm: Link(
                length_m=abs(xs_m[there_x] - xs_m[column]) + abs(ys_m[there_y] - ys_m[row]),
                leads_to=(there_y * columns + there_x, (arm + 2) % 4),
            )
            for arm, (there_x, there_y) in enumerate(
                ((column, row + 1), (column + 1, row), (column, row - 1), (column - 1, row))
            )
            if 0 <= there_x < columns and 0 <= there_y < rows
        }
        crossings.append(
            draw_crossing(
                rng,
                xs_m[column],
                ys_m[row],
                (0.0, 90.0, 180.0, 270.0),
                (lanes_y[column], lanes_x[row]) * 2,
                turnarounds=turnarounds,
                links=links,
                main=(1, 3),
            )
        )
    # A green for each approach alone would not serve half of what a street brings.
    city = replace(_furnished(rng, seed, tuple(crossings)), layout="opposites")
    return _with_own_greens(rng, city) if rng.random() < GRID_OWN_GREENS_SHARE else city


def _places(rng: random.Random, num: int) -> list[float]:
    """Where parallel streets lie, in metres."""
    return list(itertools.accumulate([0.0] + [rng.uniform(*BLOCK_M) for _ in range(num - 1)]))


def _furnished(rng: random.Random, seed: int, crossings: tuple[Crossing, ...]) -> City:
    """The city of some junctions: its signals, vehicles and side roads."""
    city = City(
        seed=seed,
        crossings=crossings,
        layout="incoming" if rng.random() < 0.12 else "opposites",
        left_green_s=rng.choices((6, 10, 0), (0.65, 0.25, 0.1))[0],
        permissive_left_mps=rng.choices((19.44, 12.0), (0.8, 0.2))[0],
        yellow_s=rng.choice((3, 3, 4, 5)),
        truck_share=round(rng.uniform(0.0, 0.08), 3),
        late_lanes=rng.random() < 0.5,
        load=round(rng.uniform(0.3, 0.5), 3),
        own_greens="none",
    )
    return replace(city, crossings=tuple(_with_side_roads(seed, c) for c in city.crossings))


def _with_side_roads(seed: int, crossing: Crossing) -> Crossing:
    """Some approaches lose vehicles shortly before the signal, as most do in mapped cities."""
    rng = random.Random(f"side roads/{seed}/{crossing.x_m}/{crossing.y_m}")
    arms = []
    for arm in crossing.arms:
        share = rng.uniform(0.03, 0.35) if rng.random() < SIDE_ROAD_SHARE else 0.0
        if share and len(arm.segments_m) > 1 and arm.segments_m[0] < SIDE_ROAD_BELOW_M:
            # Of one or two lanes that arrive there, each leads to one of them too.
            num = min(2, arm.segment_lanes[1])
            turn_off_vph = arm.rate_vph * share / (1.0 - share)
            arm = replace(arm, turn_offs_vph=(turn_off_vph / num,) * num)
        arms.append(arm)
    return replace(crossing, arms=tuple(arms))


def _with_own_greens(rng: random.Random, city: City) -> City:
    """Up to eight greens at a junction of four arms; in half of these cities no left yields."""
    protected = rng.random() < 0.5
    return replace(
        city,
        own_greens=rng.choice(("main", "all", "all")),
        left_green_s=city.left_green_s or 6,
        permissive_left_mps=0.0 if protected else city.permissive_left_mps,
    )


def streams(city: City) -> tuple[Stream, ...]:
    """Every way through the city that vehicles take, with its mean rate."""
    found = []
    for c, crossing in enumerate(city.crossings):
        for a, arm in enumerate(crossing.arms):
            if arm.rate_vph > 0:
                for path, share in _routes(city, c, a):
                    found.append(
                        Stream(
                            entry=(c, a),
                            path=path,
                            rate_vph=arm.rate_vph * share,
                            profile=arm.profile,
                        )
                    )
                found += [
                    Stream(entry=(c, a), path=(), side=i, rate_vph=rate_vph, profile=arm.profile)
                    for i, rate_vph in enumerate(arm.turn_offs_vph)
                ]
    return tuple(found)


def _routes(city: City, crossing: int, arm: int, turns: int = 0) -> Iterator[tuple[Route, float]]:
    """Ways on from an arm and their shares, which sum to one.

    Who has turned `MAX_TURNS` times goes straight on, so nobody comes to a junction twice.
    """
    movements = city.crossings[crossing].arms[arm].movements
    if turns == MAX_TURNS:
        movements = tuple(m for m in movements if m.turn == "through")
    total = sum(m.share for m in movements)
    for movement in movements:
        step, share = (crossing, movement.to_arm), movement.share / total
        there = city.leads_to(*step)
        if there is None:
            yield (step,), share
            continue
        for rest, rest_share in _routes(city, *there, turns + (movement.turn != "through")):
            yield (step, *rest), share * rest_share


def _draw_bearings(rng: random.Random) -> list[float]:
    """Bearings of 3 to 5 arms, clockwise; arms 0 and 2 are the main road."""
    base = rng.uniform(0.0, 360.0)
    num = rng.choices((3, 4, 5), (0.32, 0.64, 0.04))[0]
    if num == 3 and rng.random() < 0.7:
        steps, jitter = [0.0, 90.0, 180.0], 16.0
        if rng.random() < 0.5:
            steps[1] = 270.0
    else:
        steps, jitter = [360.0 / num * i for i in range(num)], {3: 16.0, 4: 16.0, 5: 7.0}[num]
    return [(base + step + rng.uniform(-jitter, jitter)) % 360.0 for step in steps]


def _draw_arterial(rng: random.Random) -> tuple[Crossing, Crossing]:
    """Two crossings whose arms 0 meet; each has two or three further arms."""
    direction = rng.uniform(0.0, 360.0)
    length_m = rng.uniform(140.0, 320.0)
    lanes = rng.choice((2, 2, 3))
    turnarounds = rng.random() < 0.3
    crossings = []
    for end in range(2):
        towards = (direction + 180.0 * end) % 360.0
        steps = rng.choice(([90.0, 180.0], [180.0, 270.0], [90.0, 180.0, 270.0]))
        bearings = [towards] + [(towards + s + rng.uniform(-14, 14)) % 360.0 for s in steps]
        radius_m = length_m * end
        main = (0, 1 + steps.index(180.0))
        crossings.append(
            draw_crossing(
                rng,
                radius_m * math.sin(math.radians(direction)),
                radius_m * math.cos(math.radians(direction)),
                bearings,
                draw_lanes(rng, len(bearings), main, lanes),
                turnarounds=turnarounds,
                links={0: Link(length_m=length_m, leads_to=(1 - end, 0))},
                main=main,
            )
        )
    return crossings[0], crossings[1]
