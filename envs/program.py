"""The fixed-time program of a generated city: which greens it has and how long each lasts.

netconvert writes a first program; here it gains the left-turn phases that mapped cities have where
a left shares its lane, and green times by counted traffic. Nothing here runs a simulation.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from envs.city import City, streams
from envs.crossing import MAIN_PRIORITY, Crossing
from envs.signals import green_states, transition_state

SATURATION_VPH = 1800.0
"""Vehicles per hour of green on one lane."""
PLANNED_LOAD = 0.7
"""Degree of saturation that the cycle is made for."""
MIN_GREEN_S = 6.0
GIVE_WAY_WEIGHT = 0.35
"""Share of a protected green's capacity that a left has while it gives way."""
CYCLE_BOUNDS_S = (60.0, 110.0)


def plan_signals(city: City, net: Path) -> float:
    """Rewrite the programs in the network; the vehicles per hour that its greens serve in turn.

    That is the sum over greens of their busiest lane, at the junction where it is largest.
    """
    link_vph = _link_volumes(city)
    critical_vph = 0.0
    with _rewritten(net) as root:
        for logic in root.iter("tlLogic"):
            links = _links(root, logic)
            if city.left_green_s > 0 and city.layout == "opposites":
                _add_left_phases(logic, links, _requests(root, logic, "foes"))
            _yield_in_greens(logic, _requests(root, logic, "response"))
            critical_vph = max(critical_vph, _set_greens(logic, links, link_vph))
    return critical_vph


def add_own_greens(city: City, net: Path) -> None:
    """A further green for every approach that has one of its own, all of its lanes at once.

    Signals choose freely between greens, so the shared ones stay; in the fixed program each comes
    after all of them.
    """
    link_vph = _link_volumes(city)
    with _rewritten(net) as root:
        for logic in root.iter("tlLogic"):
            links = _links(root, logic)
            c = int(logic.get("id", "").removeprefix("c"))
            _append_greens(logic, list(_own_states(city, c, city.crossings[c], links)))
            _yield_in_greens(logic, _requests(root, logic, "response"))
            _set_greens(logic, links, link_vph)


@contextmanager
def _rewritten(net: Path) -> Iterator[ET.Element]:
    """The network to change; it is written when all went well."""
    tree = ET.parse(net)
    yield tree.getroot()
    ET.indent(tree)
    tree.write(net, encoding="UTF-8", xml_declaration=True)


def _links(root: ET.Element, logic: ET.Element) -> dict[int, ET.Element]:
    """The connections that a program controls, by their place in its states."""
    return {
        int(link.get("linkIndex", "")): link
        for link in root.iter("connection")
        if link.get("tl") == logic.get("id")
    }


def _own_states(
    city: City, c: int, crossing: Crossing, links: dict[int, ET.Element]
) -> Iterator[str]:
    for a, arm in enumerate(crossing.arms):
        if city.own_greens == "all" or arm.priority == MAIN_PRIORITY:
            opened = {i for i, link in links.items() if _approach(link) == f"in{c}_{a}_0"}
            yield "".join("G" if i in opened else "r" for i in range(len(links)))


def _append_greens(logic: ET.Element, states: list[str]) -> None:
    """The program's greens, then those of `states` that it has not; yellow where a green ends."""
    shown = [phase.get("state", "") for phase in logic]
    [yellow_s, *_] = [
        phase.get("duration", "") for phase in logic if not is_green(phase.get("state", ""))
    ]
    greens = [state for state in shown if is_green(state)]
    opened = {state.upper() for state in greens}
    greens += [state for state in states if state.upper() not in opened]
    for phase in list(logic):
        logic.remove(phase)
    for state, following in zip(greens, greens[1:] + greens[:1], strict=True):
        ET.SubElement(logic, "phase", duration="6", state=state)
        change = transition_state(state, following)
        if "y" in change:
            ET.SubElement(logic, "phase", duration=yellow_s, state=change)


def write_actuated(net: Path, additional: Path) -> None:
    """The programs of the network once more, with greens that last while vehicles come."""
    root = ET.Element("additional")
    for logic in ET.parse(net).getroot().iter("tlLogic"):
        name = logic.get("id", "")
        copy = ET.SubElement(
            root, "tlLogic", id=name, type="actuated", programID="actuated", offset="0"
        )
        for phase in logic:
            state, duration = phase.get("state", ""), phase.get("duration", "")
            bounds = {"minDur": "5", "maxDur": "50"} if is_green(state) else {}
            ET.SubElement(copy, "phase", {"duration": duration, "state": state, **bounds})
    ET.ElementTree(root).write(additional)


def is_green(state: str) -> bool:
    """Whether a signal state is a green phase, not a change between two."""
    return bool(green_states([state]))


def _approach(link: ET.Element) -> str:
    return link.get("from", "")


def _requests(root: ET.Element, logic: ET.Element, kind: str) -> list[str]:
    """For each link of a program's junction a string with 1 at the links of a kind.

    `foes` are links that it crosses, `response` those of them that it gives way to.
    """
    node = next(j for j in root.iter("junction") if j.get("id") == logic.get("id"))
    return [request.get(kind, "")[::-1] for request in node.iter("request")]


def _yield_in_greens(logic: ET.Element, responses: list[str]) -> None:
    """Of two crossing links that both have right of way the one that must respond gives way.

    netconvert misses this where a junction of five arms has two lefts on one approach.
    """
    for phase in logic:
        state = phase.get("state", "")
        phase.set(
            "state",
            "".join(
                "g"
                if light == "G" and any(state[j] == "G" and r == "1" for j, r in enumerate(row))
                else light
                for light, row in zip(state, responses, strict=True)
            ),
        )


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
    logic: ET.Element, links: dict[int, ET.Element], link_vph: dict[str, float]
) -> float:
    """Green times in proportion to the busiest lane of each green (Webster's rule); their sum."""
    greens = [phase for phase in logic if is_green(phase.get("state", ""))]
    lost_s = sum(float(phase.get("duration", "0")) for phase in logic if phase not in greens)
    volumes = _critical_volumes([phase.get("state", "") for phase in greens], links, link_vph)
    low_s, high_s = CYCLE_BOUNDS_S
    cycle_s = min(high_s, max(low_s, (1.5 * lost_s + 5.0) / (1.0 - PLANNED_LOAD)))
    spare_s = max(0.0, cycle_s - lost_s - MIN_GREEN_S * len(greens))
    for phase, volume in zip(greens, volumes, strict=True):
        green_s = MIN_GREEN_S + spare_s * volume / max(1.0, sum(volumes))
        phase.set("duration", f"{round(green_s)}")
    return sum(volumes)


def _critical_volumes(
    states: list[str], links: dict[int, ET.Element], link_vph: dict[str, float]
) -> list[float]:
    """For each green the volume of its busiest lane.

    A link served by several greens is split between them, most to those in which it need not
    give way.
    """
    weight = {"G": 1.0, "g": GIVE_WAY_WEIGHT}
    total = {i: sum(weight.get(state[i], 0.0) for state in states) for i in links}
    critical = []
    for state in states:
        lanes: dict[str, float] = {}
        for i, link in links.items():
            lane = f"{_approach(link)}_{link.get('fromLane')}"
            share = weight.get(state[i], 0.0) / max(total[i], GIVE_WAY_WEIGHT)
            volume = link_vph.get(f"{lane}>{link.get('to')}", 0.0)
            lanes[lane] = lanes.get(lane, 0.0) + volume * share
        critical.append(max(lanes.values()))
    return critical


def _link_volumes(city: City) -> dict[str, float]:
    """Vehicles per hour by `lane>edge` at a stop line; a movement spreads evenly over its lanes."""
    volumes: dict[str, float] = {}
    for stream in streams(city):
        a = stream.entry[1]
        for c, to_arm in stream.path:
            moves = city.crossings[c].arms[a].movements
            lanes = next(m.lanes for m in moves if m.to_arm == to_arm)
            for lane, _ in lanes:
                name = f"in{c}_{a}_0_{lane}>{city.exit_edge(c, to_arm)}"
                volumes[name] = volumes.get(name, 0.0) + stream.rate_vph / len(lanes)
            _, a = city.leads_to(c, to_arm) or (c, a)
    return volumes
