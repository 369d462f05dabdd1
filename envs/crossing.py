"""Draw one signalised junction as numbers: roads and lanes, who turns where, how many come.

Structure follows what mapped cities show: shared lanes, approaches of uneven length that gain a
lane shortly before the stop line, a main road and a minor one, demand that drifts and peaks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from envs.lane_use import draw_lane_use, target_lanes

HOUR_S = 3600
SLICE_S = 300
"""Demand is constant for this long."""

MAIN_PRIORITY = 9
"""SUMO's rank of a main road; others have less."""


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
    leads_to: tuple[int, int] | None = None
    """(crossing, arm) at the other end of a road between two junctions."""
    turn_offs_vph: tuple[float, ...] = ()
    """Vehicles that leave by a side road to the right, and by one to the left, where the approach's
    first piece begins; beside `rate_vph`. Detectors behind cannot tell who will come to the
    signal."""

    @property
    def lanes_in(self) -> int:
        """Lanes at the stop line."""
        return self.segment_lanes[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A road to another junction, seen from one end."""

    length_m: float
    leads_to: tuple[int, int]
    """(crossing, arm) at the other end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """A signalised junction at a place, in metres."""

    x_m: float
    y_m: float
    arms: tuple[Arm, ...]


def draw_crossing(
    rng: random.Random,
    x_m: float,
    y_m: float,
    bearings: Sequence[float],
    lanes: Sequence[int],
    *,
    turnarounds: bool,
    links: Mapping[int, Link] = MappingProxyType({}),
    main: tuple[int, int] = (0, 2),
) -> Crossing:
    """A junction whose arms leave in these directions, with these numbers of lanes.

    Arms in `links` are roads to other junctions, which must have as many lanes at their other end;
    by all others vehicles enter.
    """
    main_mps = rng.choice((11.11, 13.89, 13.89, 16.67, 19.44))
    minor_mps = min(main_mps, rng.choice((8.33, 11.11, 13.89, 13.89)))
    peak_s = rng.uniform(900.0, 2700.0)
    heavy = rng.uniform(1.0, 1.6)
    u_turns = [rng.uniform(0.004, 0.02) if turnarounds else 0.0 for _ in bearings]
    u_turns = [0.0 if i in links else share for i, share in enumerate(u_turns)]
    movements = [
        _draw_movements(rng, arm, bearings, lanes, main, links, u_turns=u_turns[arm])
        for arm in range(len(bearings))
    ]
    arms = []
    for i, bearing in enumerate(bearings):
        link = links.get(i)
        segments, counts = _draw_segments(rng, lanes[i])
        used = [lane for ms in movements for m in ms if m.to_arm == i for _, lane in m.lanes]
        lanes_out = lanes[i] if link else max(used) + 1
        if u_turns[i] > 0:
            back = ((lanes[i] - 1, lanes_out - 1),)
            u_turn = Movement(to_arm=i, turn="turnaround", lanes=back, share=u_turns[i])
            movements[i] = (*movements[i], u_turn)
        if link:
            segments, counts = (link.length_m,), (lanes[i],)
        arms.append(
            Arm(
                bearing_deg=bearing,
                bend_deg=rng.uniform(-25.0, 25.0),
                speed_mps=main_mps if i in main else minor_mps,
                priority=MAIN_PRIORITY if i in main else MAIN_PRIORITY - 2,
                segments_m=segments,
                segment_lanes=counts,
                lanes_out=lanes_out,
                rate_vph=0.0
                if link
                else lanes[i] * rng.uniform(160.0, 340.0) * (heavy if i in main else 1.0),
                profile=_draw_profile(rng, peak_s),
                movements=movements[i],
                leads_to=link.leads_to if link else None,
            )
        )
    return Crossing(x_m=x_m, y_m=y_m, arms=tuple(arms))


def draw_lanes(
    rng: random.Random, num_arms: int, main: tuple[int, int] = (0, 2), main_lanes: int = 0
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
    links: Mapping[int, Link],
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
    while any(
        other in links and len(used) > lanes[other]
        for (_, other, _), used in zip(exits, layout, strict=True)
    ):
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
