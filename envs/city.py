"""Draw a signalised junction, or a short arterial of two, as numbers: roads, lanes, demand.

The same seed gives the same city. Structure follows what mapped cities show: shared lanes,
approaches of uneven length that gain a lane shortly before the stop line, a main road and a minor
one, lefts that give way and lefts with their own phase, demand that drifts and peaks. Nothing here
knows SUMO or files; `envs.generator` writes and builds what is drawn here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from envs.lane_use import draw_lane_use, target_lanes

HOUR_S = 3600
SLICE_S = 300
"""Demand is constant for this long."""

MAIN_PRIORITY = 9
"""SUMO's rank of a main road; others have less."""

ARTERIAL_EVERY = 6
"""Seeds divisible by this give two junctions in a row, all others one."""

SIDE_ROAD_SHARE = 0.8
SIDE_ROAD_BELOW_M = 150.0
"""Of approaches whose first piece is shorter than this, so many have a side road behind it."""

OWN_GREENS_EVERY = 10
"""Seeds divisible by this give approaches a green of their own, where junctions are simple."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Movement:
    """One way through a junction: from an arm's lanes into another arm's lanes."""

    to_arm: int
    turn: str
    """right, through, left or turnaround, by the drawn geometry."""
    lanes: tuple[tuple[int, int], ...]
    """(lane of the approach, lane of the exit), counted from the kerb."""
    share: float
    """Of the approach's vehicles; the shares of an arm sum to one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One road at a junction, both directions.

    `segments_m` are the pieces of the approach from the stop line outwards, `segment_lanes` their
    lane counts, which never grow outwards. The way out follows the approach's first pieces.
    """

    bearing_deg: float
    """Compass direction in which the road leaves the junction."""
    bend_deg: float
    """How far the road turns behind its first segment."""
    speed_mps: float
    priority: int
    segments_m: tuple[float, ...]
    segment_lanes: tuple[int, ...]
    lanes_out: int
    rate_vph: float
    """Vehicles that enter here, mean over the hour; 0 on the road between two junctions."""
    profile: tuple[float, ...]
    """Factor on the rate for each slice of the hour, mean one."""
    movements: tuple[Movement, ...]
    turn_offs_vph: tuple[float, ...] = ()
    """Vehicles that leave by a side road to the right, and by one to the left, where the approach's
    first piece begins; beside `rate_vph`. Detectors behind cannot tell who will come to the
    signal."""

    @property
    def lanes_in(self) -> int:
        """Lanes at the stop line."""
        return self.segment_lanes[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """A signalised junction at a place, in metres."""

    x_m: float
    y_m: float
    arms: tuple[Arm, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class City:
    """Everything that makes one generated scenario.

    With two crossings, arm 0 of the first and arm 0 of the second are the two ends of one road.
    """

    seed: int
    crossings: tuple[Crossing, ...]
    layout: str
    """opposites: facing approaches share a phase; incoming: every approach has its own."""
    left_green_s: int
    """Length of phases for left turns only; 0 for none."""
    permissive_left_mps: float
    """Lefts may give way inside the through phase where oncoming traffic is no faster."""
    yellow_s: int
    turnarounds: bool
    truck_share: float
    late_lanes: bool
    """Vehicles enter on the kerb lane, SUMO's default, and look for theirs on the way: where the
    approach is short they do so in front of the signal and block the lane for those behind.
    Otherwise they enter at full speed on the lane that suits their turn."""
    load: float
    """Share of a lane's saturation flow that the busiest lanes of all greens carry together."""
    own_greens: str
    """none, main or all: the arms whose approach has a green of its own beside the shared ones."""

    def is_link(self, arm: int) -> bool:
        """Whether arm `arm` of a crossing is the road to the other crossing."""
        return len(self.crossings) == 2 and arm == 0

    def exit_edge(self, crossing: int, arm: int) -> str:
        """Id of the edge by which one leaves a crossing through an arm."""
        return f"in{1 - crossing}_0_0" if self.is_link(arm) else f"out{crossing}_{arm}_0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Vehicles that enter by one arm and leave by another, as (crossing, arm) pairs."""

    entry: tuple[int, int]
    path: tuple[tuple[int, int], ...]
    """(crossing, arm) by which each crossing on the way is left; none: by a side road before."""
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
        crossings = (_draw_crossing(rng, 0.0, 0.0, _draw_bearings(rng), turnarounds=turnarounds),)
    turnarounds = any(
        m.turn == "turnaround" for c in crossings for a in c.arms for m in a.movements
    )
    city = City(
        seed=seed,
        crossings=crossings,
        layout="incoming" if rng.random() < 0.12 else "opposites",
        left_green_s=rng.choices((6, 10, 0), (0.65, 0.25, 0.1))[0],
        permissive_left_mps=rng.choices((19.44, 12.0), (0.8, 0.2))[0],
        yellow_s=rng.choice((3, 3, 4, 5)),
        turnarounds=turnarounds,
        truck_share=round(rng.uniform(0.0, 0.08), 3),
        late_lanes=rng.random() < 0.5,
        load=round(rng.uniform(0.3, 0.5), 3),
        own_greens="none",
    )
    city = replace(city, crossings=tuple(_with_side_roads(seed, c) for c in city.crossings))
    simple = city.layout == "opposites" and max(len(c.arms) for c in crossings) <= 4
    return _with_own_greens(rng, city) if simple and seed % OWN_GREENS_EVERY == 0 else city


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
                for path, share in _paths(city, c, a):
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


def _paths(
    city: City, crossing: int, arm: int
) -> Iterator[tuple[tuple[tuple[int, int], ...], float]]:
    for movement in city.crossings[crossing].arms[arm].movements:
        step = (crossing, movement.to_arm)
        if city.is_link(movement.to_arm) and not city.is_link(arm):
            for rest, share in _paths(city, 1 - crossing, 0):
                yield (step, *rest), movement.share * share
        else:
            yield (step,), movement.share


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
        crossings.append(
            _draw_crossing(
                rng,
                radius_m * math.sin(math.radians(direction)),
                radius_m * math.cos(math.radians(direction)),
                bearings,
                turnarounds=turnarounds,
                link_m=length_m,
                main=(0, 1 + steps.index(180.0)),
                main_lanes=lanes,
            )
        )
    return crossings[0], crossings[1]


def _draw_crossing(
    rng: random.Random,
    x_m: float,
    y_m: float,
    bearings: Sequence[float],
    *,
    turnarounds: bool,
    link_m: float = 0.0,
    main: tuple[int, int] = (0, 2),
    main_lanes: int = 0,
) -> Crossing:
    lanes = _draw_lanes(rng, len(bearings), main, main_lanes)
    main_speed = rng.choice((11.11, 13.89, 13.89, 16.67, 19.44))
    minor_speed = min(main_speed, rng.choice((8.33, 11.11, 13.89, 13.89)))
    peak_s = rng.uniform(900.0, 2700.0)
    heavy = rng.uniform(1.0, 1.6)
    u_turns = [rng.uniform(0.004, 0.02) if turnarounds else 0.0 for _ in bearings]
    if link_m > 0:
        u_turns[0] = 0.0
    movements = [
        _draw_movements(rng, arm, bearings, lanes, main, u_turns=u_turns[arm])
        for arm in range(len(bearings))
    ]
    arms = []
    for i, bearing in enumerate(bearings):
        linked = link_m > 0 and i == 0
        segments, counts = _draw_segments(rng, lanes[i])
        used = [lane for ms in movements for m in ms if m.to_arm == i for _, lane in m.lanes]
        lanes_out = lanes[i] if linked else max(used) + 1
        if u_turns[i] > 0:
            back = ((lanes[i] - 1, lanes_out - 1),)
            u_turn = Movement(to_arm=i, turn="turnaround", lanes=back, share=u_turns[i])
            movements[i] = (*movements[i], u_turn)
        if linked:
            segments, counts = (link_m,), (lanes[i],)
        arms.append(
            Arm(
                bearing_deg=bearing,
                bend_deg=rng.uniform(-25.0, 25.0),
                speed_mps=main_speed if i in main else minor_speed,
                priority=MAIN_PRIORITY if i in main else MAIN_PRIORITY - 2,
                segments_m=segments,
                segment_lanes=counts,
                lanes_out=lanes_out,
                rate_vph=0.0
                if linked
                else lanes[i] * rng.uniform(160.0, 340.0) * (heavy if i in main else 1.0),
                profile=_draw_profile(rng, peak_s),
                movements=movements[i],
            )
        )
    return Crossing(x_m=x_m, y_m=y_m, arms=tuple(arms))


def _draw_lanes(
    rng: random.Random, num_arms: int, main: tuple[int, int], main_lanes: int
) -> list[int]:
    """Lanes at the stop line of each arm; the two arms of a main road resemble each other."""
    style = rng.choices(("even", "ranked", "small"), (0.4, 0.55, 0.05))[0]
    if main_lanes:
        style = "ranked"
    if style == "even":
        return [2] * num_arms
    wide = (
        main_lanes or {"ranked": rng.choices((1, 2, 3), (0.07, 0.58, 0.35))[0], "small": 1}[style]
    )
    lanes = []
    for i in range(num_arms):
        narrow = 1 if style == "small" else rng.choices((1, 2), (0.4, 0.6))[0]
        lanes.append(wide if i in main else min(narrow, wide + 1))
    return lanes


def _draw_segments(rng: random.Random, lanes: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The pieces of an approach: often a short one at the stop line, mostly 300 m or more in all.

    Some roads begin just before the signal, as they do at the edge of a map cut from a city.
    """
    if rng.random() < 0.2:
        return (rng.uniform(60.0, 130.0),), (lanes,)
    if rng.random() < 0.55:
        first = rng.uniform(42.0, 105.0)
        grows = lanes > 1 and rng.random() < 0.45
        upstream = lanes - 1 if grows else lanes
        second = rng.uniform(60.0, 200.0)
        if rng.random() < 0.4:
            return (first, second, rng.uniform(180.0, 300.0)), (lanes, upstream, upstream)
        return (first, second + 180.0), (lanes, upstream)
    return (rng.uniform(120.0, 360.0), rng.uniform(100.0, 250.0)), (lanes, lanes)


def _draw_profile(rng: random.Random, peak_s: float) -> tuple[float, ...]:
    """One peak, at a slightly different time on every arm, and noise from slice to slice."""
    own_peak_s = peak_s + rng.gauss(0.0, 400.0)
    factors = []
    for i in range(HOUR_S // SLICE_S):
        middle_s = (i + 0.5) * SLICE_S
        peak = math.exp(-(((middle_s - own_peak_s) / 800.0) ** 2))
        factors.append((0.6 + 0.7 * peak) * math.exp(rng.gauss(0.0, 0.22)))
    mean = sum(factors) / len(factors)
    return tuple(f / mean for f in factors)


def _turn(bearing_in: float, bearing_out: float) -> tuple[float, str]:
    """Change of heading in degrees (right is positive) and its name."""
    change = (bearing_out - (bearing_in + 180.0) + 180.0) % 360.0 - 180.0
    if abs(change) < 45.0:
        return change, "through"
    return change, "right" if change > 0 else "left"


def _draw_movements(
    rng: random.Random,
    arm: int,
    bearings: Sequence[float],
    lanes: Sequence[int],
    main: tuple[int, int],
    *,
    u_turns: float,
) -> tuple[Movement, ...]:
    """Which lane may go where, from right to left, and how many vehicles do."""
    exits = []
    for other, bearing in enumerate(bearings):
        if other != arm:
            change, turn = _turn(bearings[arm], bearing)
            exits.append((-change, other, turn))
    exits.sort()
    layout = draw_lane_use(rng, lanes[arm], [turn for _, _, turn in exits])
    typical = {"through": 3.0, "left": 1.0, "right": 1.0}
    weights = []
    for _, other, turn in exits:
        weight = typical[turn] * math.exp(rng.gauss(0.0, 0.5))
        weights.append(weight * (1.5 if other in main else 0.8))
    total = sum(weights) / (1.0 - u_turns)
    movements = []
    for (_, other, turn), used, weight in zip(exits, layout, weights, strict=True):
        targets = target_lanes(len(used), max(lanes[other], len(used)), turn)
        pairs = tuple(zip(used, targets, strict=True))
        movements.append(Movement(to_arm=other, turn=turn, lanes=pairs, share=weight / total))
    return tuple(movements)
