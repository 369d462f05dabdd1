"""Read a user's network and demand just far enough to say in one sentence what is wrong with them.

Reading stops once enough has been seen. What only SUMO itself can find (a route whose edges do not
connect, say) is left to SUMO.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from envs.demand import departures, elements, listed
from envs.errors import UserError
from envs.signals import green_states
from envs.types import Scenario

NUM_CHECKED = 500
"""So many vehicles, trips, flows and routes of each file are compared with the network."""


def check_scenario(scenario: Scenario) -> None:
    """The files exist and parse, the network has signals, the demand is on it and in the window."""
    for role, path in _named_files(scenario):
        if not Path(path).is_file():
            raise UserError(
                f"The {role} {path} of scenario {scenario.name} does not exist: check the path."
            )
    check_step_length(scenario)
    edges = _check_net(scenario)
    departs = [_check_routes(scenario, path, edges) for path in scenario.route_files]
    if not any(departs):
        raise UserError(
            f"No vehicle of {listed(scenario.route_files)} departs between "
            f"{scenario.begin_s:g} s and {scenario.end_s:g} s: check the demand and the window."
        )


def check_step_length(scenario: Scenario) -> None:
    """Signals change and losses are sampled at whole seconds: steps must meet them."""
    length = scenario.step_length_s
    if length <= 0 or abs(round(1 / length) * length - 1) > 1e-9:
        raise UserError(
            f"Scenario {scenario.name} has a step-length of {length:g} s, but it must divide one "
            "second, such as 1, 0.5 or 0.1: change step-length in its .sumocfg."
        )


def _named_files(scenario: Scenario) -> Iterator[tuple[str, str]]:
    yield "network", scenario.net_file
    for path in scenario.route_files:
        yield "route file", path
    for path in scenario.additional_files:
        yield "additional file", path


def _check_net(scenario: Scenario) -> set[str]:
    """Edges of the network, which must have a signal with a choice, if need be by a program of an
    additional file."""
    path = scenario.net_file
    edges: set[str] = set()
    greens: dict[str, int] = {}
    for role, file in _named_files(scenario):
        for element in elements(role, file) if role != "route file" else ():
            if element.tag == "edge" and role == "network":
                edges.add(element.get("id", ""))
            elif element.tag == "tlLogic":
                states = [phase.get("state", "") for phase in element.iter("phase")]
                name = element.get("id", "")
                greens[name] = max(len(green_states(states)), greens.get(name, 0))
    if not edges:
        raise UserError(
            f"The network {path} must be one that netconvert writes, but it has no edge."
        )
    if not greens:
        raise UserError(
            f"The network {path} has no traffic light to control: build it with netconvert's "
            "--tls.guess or --tls.set."
        )
    if max(greens.values()) < 2:
        raise UserError(
            f"No traffic light of the network {path} has two green phases to choose from: rebuild "
            "its programs with netconvert's --tls.rebuild."
        )
    return edges


def _check_routes(scenario: Scenario, path: str, edges: set[str]) -> bool:
    """Whether a vehicle of the file departs in the window; all edges it names must exist."""
    departs, checked = False, 0
    for element in elements("route file", path):
        if checked < NUM_CHECKED:
            named = _edges(element)
            checked += bool(named)
            for edge in named:
                if edge not in edges:
                    owner = f"{element.tag} {element.get('id', '')}".strip()
                    raise UserError(
                        f"A {owner} of {path} uses edge {edge!r}, which is not in the network "
                        f"{scenario.net_file}: these files do not belong together."
                    )
        times = departures(element, scenario.begin_s)
        if times and times[0] < scenario.end_s and times[-1] >= scenario.begin_s:
            departs = True
        if departs and checked >= NUM_CHECKED:
            break
    return departs


def _edges(element: ET.Element) -> list[str]:
    """Edges that a route, trip or flow names itself."""
    if element.tag == "route":
        return element.get("edges", "").split()
    if element.tag in ("trip", "flow"):
        ends = [element.get("from", ""), *element.get("via", "").split(), element.get("to", "")]
        return [edge for edge in ends if edge]
    return []
