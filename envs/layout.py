"""Reads from the running simulation what never changes: junctions, their lanes and green phases.

Junctions whose program has fewer than two green phases have nothing to decide and are left to
their own program.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import libsumo

from envs.errors import UserError
from envs.naming import phase_name
from envs.signals import GREEN, green_states
from envs.types import SECTORS, TURNS, JunctionSpec, LaneSpec, Phase, Turn

DETECTOR_RANGE_M = 200.0
"""How far upstream of the stop line detectors see; RESCO's value."""

_TURN_OF_LETTER: dict[str, Turn] = {
    "s": "through",
    "l": "left",
    "L": "left",
    "r": "right",
    "R": "right",
    "t": "turnaround",
}

Direction = tuple[int, str, str, Turn]
"""Index of its light in the signal's state, incoming lane, outgoing lane, turn."""


def junction_specs() -> tuple[JunctionSpec, ...]:
    """All junctions of the loaded network that have a choice of green phase.

    Phases are named A, B, C, ... in the order of the net's own program.

    Raises:
        UserError: no junction of the network has two green phases.
    """
    roads = _Roads()
    specs = [_junction_spec(tls_id, roads) for tls_id in libsumo.trafficlight.getIDList()]
    found = tuple(spec for spec in specs if spec is not None)
    if not found:
        raise UserError(
            "expected a network with a traffic light of at least two green phases, found "
            f"{len(specs)} traffic lights and none with a choice; add one in netedit or with "
            "netconvert --tls.guess"
        )
    return found


class _Roads:
    """What leads where in the loaded network."""

    def __init__(self) -> None:
        self.feeders = _feeders()
        """Lane -> lanes from which one may get to it."""
        self.own_feeders = _own_feeders()
        """Lane -> lanes that lead into it and nowhere else."""
        self.controlled = _controlled_lanes()


def running_program(tls_id: str) -> Any:
    """SUMO's logic of the program that a traffic light runs now; additional files may bring others
    than the network's own."""
    now = libsumo.trafficlight.getProgram(tls_id)
    (logic,) = [
        logic
        for logic in libsumo.trafficlight.getAllProgramLogics(tls_id)
        if logic.programID == now
    ]
    return logic


def _junction_spec(tls_id: str, roads: _Roads) -> JunctionSpec | None:
    states = list(green_states([phase.state for phase in running_program(tls_id).phases]))
    links = libsumo.trafficlight.getControlledLinks(tls_id)
    if len(states) < 2:
        return None
    directions = _link_directions(links)
    lane_ids = tuple(dict.fromkeys(incoming for _, incoming, _, _ in directions))
    if not lane_ids:
        return None
    approaches = _approaches(lane_ids)
    lanes = tuple(_lane_spec(lane_id, approaches, directions, roads) for lane_id in lane_ids)
    phases = tuple(
        _phase(phase_name(i), state, directions, lanes, roads) for i, state in enumerate(states)
    )
    served = tuple(phase for phase in phases if phase.lanes)
    return JunctionSpec(tls_id=tls_id, lanes=lanes, phases=served) if len(served) > 1 else None


def _link_directions(
    links: Iterable[Iterable[tuple[str, str, str]]],
) -> list[Direction]:
    """The ways that a signal controls, of which several may share one light; pedestrian crossings
    are left out."""
    found = []
    for i, group in enumerate(links):
        for incoming, outgoing, _ in group:
            if incoming.startswith(":"):
                continue
            turn = next(
                (
                    _TURN_OF_LETTER.get(link[6], "through")
                    for link in libsumo.lane.getLinks(incoming)
                    if link[0] == outgoing
                ),
                "through",
            )
            found.append((i, incoming, outgoing, turn))
    return found


def _phase(
    name: str,
    state: str,
    directions: Sequence[Direction],
    specs: Sequence[LaneSpec],
    roads: _Roads,
) -> Phase:
    index = {spec.lane_id: i for i, spec in enumerate(specs)}
    opened: dict[int, list[tuple[Turn, bool]]] = defaultdict(list)
    downstream: list[str] = []
    inside: list[str] = []
    for link, incoming, outgoing, turn in directions:
        if state[link] in GREEN:
            opened[index[incoming]].append((turn, state[link] == "G"))
            downstream.append(outgoing)
            inside += _within(incoming, outgoing)
    lanes = tuple(sorted(opened))
    return Phase(
        name=name,
        state=state,
        lanes=lanes,
        turns=tuple(_ordered(turn for turn, _ in opened[lane]) for lane in lanes),
        protected=tuple(all(priority for _, priority in opened[lane]) for lane in lanes),
        downstream=tuple(dict.fromkeys(downstream)),
        inside=tuple(dict.fromkeys(inside)),
        upstream=_together([specs[lane] for lane in lanes]),
    )


def _within(incoming: str, outgoing: str) -> Iterator[str]:
    """The lanes within the junction from one lane to another, in the order of driving."""
    lane = incoming
    while lane != outgoing:
        links = [link for link in libsumo.lane.getLinks(lane) if link[0] == outgoing]
        lane = links[0][4] or outgoing if links else outgoing
        if lane != outgoing:
            yield lane


def _ordered(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    present = set(turns)
    return tuple(turn for turn in TURNS if turn in present)


def _lane_spec(
    lane_id: str,
    approaches: Mapping[str, str],
    directions: Sequence[Direction],
    roads: _Roads,
) -> LaneSpec:
    chain = _reach([(lane_id, 0.0)], roads.own_feeders, roads.controlled)
    return LaneSpec(
        lane_id=lane_id,
        approach=approaches[libsumo.lane.getEdgeID(lane_id)],
        turns=_ordered(turn for _, incoming, _, turn in directions if incoming == lane_id),
        length_m=max(end + libsumo.lane.getLength(lane) for lane, end in chain),
        speed_limit_mps=libsumo.lane.getMaxSpeed(lane_id),
        chain=chain,
        upstream=_reach(chain, roads.feeders, roads.controlled)[len(chain) :],
    )


def _together(lanes: Sequence[LaneSpec]) -> tuple[tuple[str, float], ...]:
    """What is upstream of some lanes, each with the nearest of its ends."""
    own = {name for lane in lanes for name, _ in lane.chain}
    ends: dict[str, float] = {}
    for name, end in (upstream for lane in lanes for upstream in lane.upstream):
        if name not in own:
            ends[name] = min(end, ends.get(name, end))
    return tuple(ends.items())


def _reach(
    lanes: Sequence[tuple[str, float]],
    feeders: Mapping[str, tuple[str, ...]],
    controlled: frozenset[str],
) -> tuple[tuple[str, float], ...]:
    """The lanes and what feeds them within detector range, up to the next signal."""
    found = list(lanes)
    seen = {lane for lane, _ in lanes}
    for lane, end in found:
        start = end + libsumo.lane.getLength(lane)
        if start >= DETECTOR_RANGE_M:
            continue
        for feeder in feeders.get(lane, ()):
            if feeder not in seen and feeder not in controlled:
                seen.add(feeder)
                found.append((feeder, start))
    return tuple(found)


def _feeders() -> dict[str, tuple[str, ...]]:
    """Lane -> lanes from which one may get to it. Whoever comes from a road that does not lead into
    it, only into a lane beside it, gets there by changing lanes."""
    found: dict[str, list[str]] = defaultdict(list)
    into: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for lane, links in _links():
        for link in links:
            found[link[0]].append(lane)
            into[libsumo.lane.getEdgeID(link[0])][libsumo.lane.getEdgeID(lane)].append(lane)
    for edge, roads in into.items():
        for i in range(libsumo.edge.getLaneNumber(edge)):
            direct = {libsumo.lane.getEdgeID(lane) for lane in found[f"{edge}_{i}"]}
            for road, lanes in roads.items():
                if road not in direct:
                    found[f"{edge}_{i}"] += lanes
    return {lane: tuple(dict.fromkeys(feeders)) for lane, feeders in found.items()}


def _own_feeders() -> dict[str, tuple[str, ...]]:
    """A lane that widens into several belongs to the first of them only, so no vehicle is counted
    twice."""
    found: dict[str, list[str]] = defaultdict(list)
    for lane, links in _links():
        if len({libsumo.lane.getEdgeID(link[0]) for link in links}) == 1:
            found[links[0][0]].append(lane)
    return {lane: tuple(feeders) for lane, feeders in found.items()}


def _links() -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Every lane of a road with its ways on, but for those back."""
    for lane in libsumo.lane.getIDList():
        if not lane.startswith(":"):
            links = libsumo.lane.getLinks(lane)
            yield lane, [link for link in links if _TURN_OF_LETTER.get(link[6]) != "turnaround"]


def _controlled_lanes() -> frozenset[str]:
    return frozenset(
        lane
        for tls_id in libsumo.trafficlight.getIDList()
        for lane in libsumo.trafficlight.getControlledLanes(tls_id)
    )


def _approaches(lane_ids: Iterable[str]) -> dict[str, str]:
    """Edge -> name of the compass sector it comes from, numbered when sectors coincide."""
    bearings = {}
    for lane_id in lane_ids:
        (x0, y0), (x1, y1) = libsumo.lane.getShape(lane_id)[-2:]
        bearings.setdefault(
            libsumo.lane.getEdgeID(lane_id), math.degrees(math.atan2(x0 - x1, y0 - y1)) % 360
        )
    names: dict[str, str] = {}
    taken: dict[str, int] = defaultdict(int)
    for edge, bearing in sorted(bearings.items(), key=lambda item: (item[1], item[0])):
        sector = SECTORS[round(bearing / 45) % 8]
        taken[sector] += 1
        names[edge] = sector if taken[sector] == 1 else f"{sector}{taken[sector]}"
    return names
