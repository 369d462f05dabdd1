"""The fixed-time program of a generated city: which greens it has and how long each lasts.

netconvert writes a first program; here it gains the left-turn phases that mapped cities have where
a left shares its lane, and green times by counted traffic. Nothing here runs a simulation.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from envs.city import City, streams

SATURATION_VPH = 1800.0
"""Vehicles per hour of green on one lane."""
PLANNED_LOAD = 0.6
"""Degree of saturation that the cycle is made for."""
MIN_GREEN_S = 6.0
CYCLE_BOUNDS_S = (50.0, 100.0)


def plan_signals(city: City, net: Path) -> float:
    """Rewrite the programs in the network; the vehicles per hour that its greens serve in turn.

    That is the sum over greens of their busiest lane, at the junction where it is largest.
    """
    tree = ET.parse(net)
    root = tree.getroot()
    lane_vph = _lane_volumes(city)
    critical_vph = 0.0
    for logic in root.iter("tlLogic"):
        links = {
            int(link.get("linkIndex", "")): link
            for link in root.iter("connection")
            if link.get("tl") == logic.get("id")
        }
        if city.left_green_s > 0 and city.layout == "opposites":
            _add_left_phases(logic, links, _foes(root, logic.get("id", "")))
        critical_vph = max(critical_vph, _set_greens(logic, links, lane_vph))
    ET.indent(root)
    tree.write(net, encoding="UTF-8", xml_declaration=True)
    return critical_vph


def is_green(state: str) -> bool:
    """Whether a signal state is a green phase, not a change between two."""
    return bool(set(state) & set("Gg")) and not set(state) & set("yYu")


def _approach(link: ET.Element) -> str:
    return link.get("from", "")


def _foes(root: ET.Element, junction: str) -> list[str]:
    """For each link of a junction a string that has 1 where the other link crosses it."""
    node = next(j for j in root.iter("junction") if j.get("id") == junction)
    return [request.get("foes", "")[::-1] for request in node.iter("request")]


def _add_left_phases(logic: ET.Element, links: dict[int, ET.Element], foes: list[str]) -> None:
    """After every green whose lefts give way, on approaches of two lanes or more: their own green.

    netconvert adds one only where a left turn has a lane to itself.
    """
    wide = {_approach(link) for link in links.values() if link.get("fromLane") != "0"}
    greens = {phase.get("state", "") for phase in logic if is_green(phase.get("state", ""))}
    for phase in list(logic):
        state = phase.get("state", "")
        if not is_green(state):
            continue
        lefts = {
            i
            for i, light in enumerate(state)
            if light == "g" and links[i].get("dir") in ("l", "L") and _approach(links[i]) in wide
        }
        own = _left_state(state, lefts, links)
        if not lefts or any(all(other[i] == "G" for i in lefts) for other in greens):
            continue
        if any(foes[i][j] == "1" for i in lefts for j in lefts):
            continue
        place = list(logic).index(phase)
        change = logic[place + 1]
        before = "".join(
            light if own[i] == "G" else ("y" if light in "Gg" else change.get("state", "")[i])
            for i, light in enumerate(state)
        )
        following = logic[(place + 2) % len(logic)].get("state", "")
        after = "".join(
            "r" if light != "G" else ("G" if following[i] in "Gg" else "y")
            for i, light in enumerate(own)
        )
        yellow = change.get("duration", "3")
        change.set("state", before)
        logic.insert(place + 2, ET.Element("phase", duration="6", state=own))
        logic.insert(place + 3, ET.Element("phase", duration=yellow, state=after))


def _left_state(state: str, lefts: set[int], links: dict[int, ET.Element]) -> str:
    """Green for the lefts of facing approaches, or for all of a single approach that has a left."""
    approaches = {_approach(links[i]) for i in lefts}
    if len(approaches) == 1:
        return "".join(
            "G" if _approach(links[i]) in approaches and light in "Gg" else "r"
            for i, light in enumerate(state)
        )
    return "".join(
        "G" if i in lefts or (light == "g" and links[i].get("dir") == "t") else "r"
        for i, light in enumerate(state)
    )


def _set_greens(
    logic: ET.Element, links: dict[int, ET.Element], lane_vph: dict[str, float]
) -> float:
    """Green times in proportion to the busiest lane of each green (Webster's rule); their sum."""
    greens = [phase for phase in logic if is_green(phase.get("state", ""))]
    lost_s = sum(float(phase.get("duration", "0")) for phase in logic if phase not in greens)
    volumes = _critical_volumes([phase.get("state", "") for phase in greens], links, lane_vph)
    low_s, high_s = CYCLE_BOUNDS_S
    cycle_s = min(high_s, max(low_s, (1.5 * lost_s + 5.0) / (1.0 - PLANNED_LOAD)))
    spare_s = max(0.0, cycle_s - lost_s - MIN_GREEN_S * len(greens))
    for phase, volume in zip(greens, volumes, strict=True):
        green_s = MIN_GREEN_S + spare_s * volume / max(1.0, sum(volumes))
        phase.set("duration", f"{round(green_s)}")
    return sum(volumes)


def _critical_volumes(
    states: list[str], links: dict[int, ET.Element], lane_vph: dict[str, float]
) -> list[float]:
    """For each green the volume of its busiest lane; a lane served twice is split in halves."""
    names = {i: f"{_approach(link)}_{link.get('fromLane')}" for i, link in links.items()}
    served = [{names[i] for i, light in enumerate(s) if light in "Gg"} for s in states]
    times = {lane: sum(lane in lanes for lanes in served) for lane in names.values()}
    return [
        max((lane_vph.get(lane, 0.0) / times[lane] for lane in lanes), default=0.0)
        for lanes in served
    ]


def _lane_volumes(city: City) -> dict[str, float]:
    """Vehicles per hour on every lane at a stop line; a movement spreads evenly over its lanes."""
    volumes: dict[str, float] = {}
    for stream in streams(city):
        a = stream.entry[1]
        for c, to_arm in stream.path:
            moves = city.crossings[c].arms[a].movements
            lanes = next(m.lanes for m in moves if m.to_arm == to_arm)
            for lane, _ in lanes:
                name = f"in{c}_{a}_0_{lane}"
                volumes[name] = volumes.get(name, 0.0) + stream.rate_vph / len(lanes)
            a = 0
    return volumes
